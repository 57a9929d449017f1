"""DeepSpeed ZeRO for the adapters, over a base that this project shards itself.

DeepSpeed (Rajbhandari et al. 2020, "ZeRO") sees the trainable parameters only: stage 1 shards
their optimizer state, stage 2 their gradients too, stage 3 the parameters too. The frozen base
rests in ``engine.row_shards``: after loading, its parameters leave the modules' registers and
become
plain attributes, which DeepSpeed neither broadcasts nor casts nor partitions. Why not as ZeRO-3
partitions: docs/decisions/0005-zero-base.md.

DeepSpeed averages gradients over ranks; the loss is multiplied by their number first, so that they
are summed (``engine.engine_protocol``). There is no bf16 or fp16 section: adapters stay float32.
"""

import copy
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from dist_peft.core.config.run import EngineConfig, TrainConfig
from dist_peft.core.progress_beat import connect_to_ranks
from dist_peft.core.span import Span
from dist_peft.core.trainable_steps import TrainableSteps
from dist_peft.core.world import World
from dist_peft.engine.compat import count_deepspeed_gathers, keep_gradient_sums
from dist_peft.engine.deepspeed_setup import hide_frozen_parameters, import_deepspeed
from dist_peft.engine.engine_protocol import (
    OptimizerFactory,
    build_lr_groups,
    init_adam_state,
    move_buffers_to_device,
    num_updates,
    train_always,
    trainable_parameters,
)
from dist_peft.engine.exact_gradients import GradientScale
from dist_peft.engine.exact_reduction import ExactReduction
from dist_peft.engine.flat_shard import FlatShard
from dist_peft.engine.mesh import build_shard_mesh
from dist_peft.engine.row_shards import RowShardedParameters
from dist_peft.engine.zero_config import (
    build_deepspeed_config,
    check_zero_support,
    shrink_reduce_bucket,
)
from dist_peft.model.adapter_module import RowUpdate

__all__ = ["ZeroEngine"]


@dataclass
class _GatherCount:
    """Bytes of DeepSpeed's all-gathers, which the parts of a split engine share."""

    num_bytes: int = 0
    is_counting: bool = False

    def add_bytes(self, count: int) -> None:
        self.num_bytes += count


class ZeroEngine:
    """Adapters sharded by DeepSpeed ZeRO, the base by ``RowShardedParameters``.

    Raises:
        UserError: deepspeed is not installed, or the configuration contradicts itself.
    """

    def __init__(
        self, config: EngineConfig, train: TrainConfig, world: World, device: torch.device
    ) -> None:
        check_zero_support(config, train)
        self.device, self.config, self.world = device, config, world
        self.deepspeed = import_deepspeed(device)
        self._settings = build_deepspeed_config(config, train, world.size)
        mesh = build_shard_mesh(config, world, device)
        self.shards = RowShardedParameters.from_config(config, mesh.get_group("shard"), device)
        self._shapes: dict[int, torch.Size] = {}
        self._names: dict[str, nn.Parameter] = {}
        self._ds: Any = None
        self._done = 0
        self._skipped = set[int]()  # steps, from 1, that have made no update
        self._moment_names: tuple[str, ...] = ()
        self._updates: dict[int, int] = {}  # id of a flat share -> its updates so far
        self._adapter_gathers = _GatherCount()
        self._scale = GradientScale.from_config(train) if train.exact else None
        self._exact: ExactReduction | None = None
        self._parts: list[ZeroEngine] = []
        self._is_part = False

    @property
    def bytes_gathered(self) -> int:
        return self.shards.bytes_gathered + self._adapter_gathers.num_bytes

    # -- before training -----------------------------------------------------------------------

    def shard_model(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        move_buffers_to_device(model, self.device)
        if self.config.shard_base:
            self.shards.shard_model(model, blocks)

    def local_row_span(self, parameter: Tensor) -> Span:
        if self.shards.is_row_sharded(parameter):
            return self.shards.local_row_span(parameter)
        return Span(0, parameter.shape[0])

    def fill_local_rows(self, owner: nn.Module, name: str, rows: Tensor) -> None:
        old = owner._parameters[name]
        assert old is not None
        if self.shards.is_row_sharded(old):
            self.shards.fill_local_rows(owner, name, rows)
            return
        assert rows.shape == old.shape and rows.dtype == old.dtype
        new = nn.Parameter(rows.to(self.device).contiguous(), requires_grad=old.requires_grad)
        owner.register_parameter(name, new)

    def setup_optimizer(
        self,
        model: nn.Module,
        factory: OptimizerFactory,
        lr_scale: Callable[[str], float],
        trainable_steps: Callable[[str], TrainableSteps] = train_always,
    ) -> nn.Module:
        self.shards.unshard_trainable()
        # DeepSpeed broadcasts and partitions each registered parameter, frozen ones too
        hide_frozen_parameters(model)
        self._names = trainable_parameters(model)
        self._moment_names = factory.moment_names
        self._shapes = {id(p): p.shape for p in self._names.values()}
        optimizer = factory.build_optimizer(build_lr_groups(self._names, lr_scale, trainable_steps))
        optimizer.state.clear()  # DeepSpeed puts flat shards in the place of the parameters
        settings = self._settings
        if self._is_part:  # a buffer of the default size for each part would be gigabytes
            settings = shrink_reduce_bucket(settings, sum(p.numel() for p in self._names.values()))
        os.environ["LOCAL_RANK"] = str(self.world.local_rank)  # srun and mpirun do not set it
        with connect_to_ranks():  # DeepSpeed makes process groups of its own
            self._ds, *_ = self.deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings, dist_init_required=False
            )
        for flat, _ in self._list_flat_shards():
            zeros = {key: torch.zeros_like(flat) for key in self._moment_names}
            optimizer.state[flat] = {**init_adam_state(flat), **zeros}
            self._updates[id(flat)] = 0
        if self.config.stage != 3:  # DeepSpeed does it after the first update; a resume is earlier
            self._ds.optimizer._lazy_init_hp_params_optimizer_state()
        if self._scale is not None:
            keep_gradient_sums(model)
            self._exact = ExactReduction(list(self._names.values()), self._scale, self.device)
        # adapters are gathered before use (stage 3) or after an update
        if not self._adapter_gathers.is_counting:
            self._adapter_gathers.is_counting = True
            count_deepspeed_gathers(self.deepspeed, self._adapter_gathers.add_bytes)
        module: nn.Module = self._ds
        return module

    def _list_flat_shards(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """This rank's float32 share of the trainable parameters, flat, with the optimizer's group:
        one tensor a group, with stage 3 one or more."""
        optimizer = self._ds.optimizer
        groups = optimizer.param_groups
        if self.config.stage == 3:
            flats = optimizer.fp32_partitioned_groups_flat
            return [(f, groups[optimizer.sub_group_to_group_id[i]]) for i, f in enumerate(flats)]
        return list(zip(optimizer.single_partition_of_fp32_groups, groups, strict=True))

    def _set_num_updates(self, step: int) -> None:
        """Tell Adam how many updates each share has had after ``step`` steps."""
        self._done = step
        for flat, group in self._list_flat_shards():
            self._updates[id(flat)] = num_updates(group, step, self._skipped)
            self._ds.optimizer.optimizer.state[flat]["step"].fill_(self._updates[id(flat)])

    def _count_update(self, is_skipped: bool) -> None:
        """The same after one more step, without counting all before."""
        for flat, group in self._list_flat_shards():
            self._updates[id(flat)] += self._is_trained(group) and not is_skipped
            self._ds.optimizer.optimizer.state[flat]["step"].fill_(self._updates[id(flat)])
        self._done += 1

    # -- training ------------------------------------------------------------------------------

    def split_optimizer(self) -> "ZeroEngine":
        part = copy.copy(self)
        part._ds, part._exact, part._parts = None, None, []
        part._names, part._shapes, part._updates = {}, {}, {}
        part._skipped = set()
        part._is_part = True
        self._parts.append(part)
        return part

    def backward(self, loss: Tensor, last: bool) -> None:
        if self._parts:  # whose hooks reduce the gradients of each
            for part in self._parts:
                part._ds.set_gradient_accumulation_boundary(last)
            (loss * (1 if self._scale else self.world.size)).backward()
            for exact in filter(None, (part._exact for part in self._parts)):
                exact.end_micro_batch()
            return
        self._ds.set_gradient_accumulation_boundary(last)
        if self._exact is not None:  # DeepSpeed sums zeros
            self._ds.backward(loss)
            self._exact.end_micro_batch()
            return
        self._ds.backward(loss * self.world.size)  # it averages over ranks: here they are summed

    def keeps_parts_in_range(self) -> bool:
        return True  # each has sums of its own

    def step(self, lr: float, max_norm: float) -> float:
        optimizer = self._ds.optimizer
        norm = None if self._exact is None else self._set_exact_gradients(self._exact, max_norm)
        optimizer.clip_grad = max_norm if norm is None else 0.0
        for group in optimizer.param_groups:
            # a frozen parameter has no gradient, but DeepSpeed updates it all the same
            group["lr"] = lr * group["lr_scale"] if self._is_trained(group) else 0.0
        with self._moments_of_frozen_kept():
            self._ds.step()  # on a norm that is not finite every rank clears its gradients instead
        if self.config.stage == 3:
            self._clear_gradient_partitions()
        if optimizer.overflow:
            self._skipped.add(self._done + 1)
        self._count_update(optimizer.overflow)
        if norm is not None:
            return norm
        return math.nan if optimizer.overflow else float(self._ds.get_global_grad_norm())

    def _set_exact_gradients(self, exact: "ExactReduction", max_norm: float) -> float:
        """Put the clipped integer sums in the place of DeepSpeed's; return their norm.

        Where it is not finite, they are NaN, so that DeepSpeed leaves out the update.
        """
        norm, grads = exact.take_gradients(max_norm)
        for parameter, grad in zip(self._names.values(), grads, strict=True):
            if grad is not None:
                self._set_full_value(parameter, grad, "grad")
        return norm

    def _clear_gradient_partitions(self) -> None:
        """Else a parameter without a gradient in the next step would get that of this step."""
        self._ds.optimizer.grad_partitions_flat_buffer.zero_()
        for flat, _ in self._list_flat_shards():
            if flat.grad is not None:  # with cpu_offload
                flat.grad.zero_()

    def _is_trained(self, group: Mapping[str, Any]) -> bool:
        steps: TrainableSteps = group["trainable_steps"]
        return steps.includes(self._done)

    @contextmanager
    def _moments_of_frozen_kept(self) -> Iterator[None]:
        """Restore moments that an update without a gradient changes, where there were others."""
        state = self._ds.optimizer.optimizer.state
        kept = [
            (state[flat][key], state[flat][key].clone())
            for flat, group in self._list_flat_shards()
            if not self._is_trained(group) and self._updates[id(flat)]
            for key in self._moment_names
        ]
        yield
        for moment, before in kept:
            moment.copy_(before)

    # -- state ---------------------------------------------------------------------------------

    def training_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, parameter in self._names.items():
            state[f"param/{name}"] = self.gather_parameter(parameter)
            for key in self._moment_names:
                state[f"{key}/{name}"] = self.gather_moment(name, key)
        return state

    def training_state_shards(self, model: nn.Module) -> dict[str, FlatShard]:
        state: dict[str, FlatShard] = {}
        for name, parameter in self._names.items():
            for key in ("param", *self._moment_names):
                values, start = self._get_local_elements(parameter, key)
                state[f"{key}/{name}"] = FlatShard(self._shapes[id(parameter)], start, values)
        return state

    def _get_local_elements(self, parameter: nn.Parameter, key: str) -> tuple[Tensor, int]:
        """Return this rank's share of a parameter or moment, flat, and where it begins."""
        if self.config.stage == 3:
            mine = self._get_padded_share(parameter, None if key == "param" else key)
            start = min(mine.numel() * self.world.rank, self._shapes[id(parameter)].numel())
            return mine[: self._shapes[id(parameter)].numel() - start], start
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:  # no element of it is in this rank's share of the group
            return torch.empty(0), 0
        values: Tensor = mapping.get_hp_fragment(None if key == "param" else key)
        return values, mapping.lp_fragment_address.start

    def _get_padded_share(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        """Return this rank's share under stage 3: equally long on all ranks, padded at the end."""
        utils = self.deepspeed.utils
        if key == "grad":
            gradient: Tensor = utils.safe_get_local_grad(parameter)
            return gradient
        share: Tensor = (
            utils.safe_get_local_fp32_param(parameter)
            if key is None
            else utils.safe_get_local_optimizer_state(parameter, key)
        )
        return share

    @torch.no_grad()
    def load_training_state_dict(
        self,
        model: nn.Module,
        state: Mapping[str, Tensor],
        step: int,
        skipped: Collection[int] = (),
    ) -> None:
        for name, parameter in self._names.items():
            value = state[f"param/{name}"]
            self.overwrite_parameter(name, value)
            for key in self._moment_names:
                moment = state.get(f"{key}/{name}", torch.zeros_like(value))
                self._set_full_value(parameter, moment.to(self.device), key)
        self._skipped = set(skipped)
        self._set_num_updates(step)

    @torch.no_grad()
    def overwrite_parameter(self, name: str, value: Tensor) -> None:
        parameter, value = self._names[name], value.to(self.device)
        gathered = [parameter] if self.config.stage == 3 else []
        with self.deepspeed.zero.GatheredParameters(gathered, modifier_rank=0):
            parameter.data.copy_(value)
        self._set_full_value(parameter, value)

    def gather_moment(self, name: str, key: str) -> Tensor:
        parameter = self._names[name]
        moment = self.deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
        return self._check_gathered_shape(moment, parameter)

    def _set_full_value(
        self, parameter: nn.Parameter, value: Tensor, key: str | None = None
    ) -> None:
        """Write the optimizer's copy of a parameter, its moment ``key``, or for "grad" the gradient
        that the next update reads."""
        utils = self.deepspeed.utils
        names = () if key in (None, "grad") else (key,)
        if self.config.stage != 3:
            what = {None: "fp32_param", "grad": "grad"}.get(key, "optimizer_state")
            getattr(utils, f"safe_set_full_{what}")(parameter, value, *names)
            return
        # DeepSpeed 0.19's safe_set_full_* reads beyond the end where ranks have uneven shares
        mine = self._get_padded_share(parameter, key)
        part = mine.numel()
        start = part * self.world.rank
        flat = functional.pad(value.flatten(), (0, part * self.world.size - value.numel()))
        mine.copy_(flat[start : start + part])

    def gather_parameter(self, parameter: Tensor) -> Tensor:
        if self.shards.is_row_sharded(parameter):
            return self.shards.gather_parameter(parameter).cpu()
        if self._ds is None or not parameter.requires_grad:
            return parameter.detach().cpu().clone()
        return self._check_gathered_shape(
            self.deepspeed.utils.safe_get_full_fp32_param(parameter), parameter
        )

    def gather_matching_rows(self, parameter: Tensor, like: Tensor) -> Tensor:
        whole = self.gather_parameter(parameter) if self.config.stage == 3 else parameter.detach()
        return whole[self.local_row_span(like).slice].cpu()

    def _check_gathered_shape(self, whole: Tensor | None, parameter: Tensor) -> Tensor:
        """Check the shape: under ZeRO-3 a parameter not gathered reads as an empty tensor."""
        shape = self._shapes[id(parameter)]
        assert whole is not None and whole.shape == shape and whole.numel(), (
            f"gathered {None if whole is None else list(whole.shape)} for {list(shape)}"
        )
        return whole.cpu()

    @torch.no_grad()
    def overwrite_local_rows(self, updates: Iterable[RowUpdate]) -> None:
        for owner, name, rows in updates:
            frozen = getattr(owner, name)
            if self.shards.is_row_sharded(frozen):
                self.shards.overwrite_local_rows(frozen, rows)
            else:
                frozen.copy_(rows)

    def get_local_bytes(self, parameter: Tensor) -> Tensor | None:
        known = self.shards.is_row_sharded(parameter)
        return self.shards.get_local_bytes(parameter) if known else None

    def sum_over_shards(self, tensor: Tensor) -> Tensor:
        if not self.config.shard_base:
            return tensor  # every rank has all rows and computed the whole sum itself
        total = tensor.clone()
        dist.all_reduce(total, group=self.shards.group)
        return total
