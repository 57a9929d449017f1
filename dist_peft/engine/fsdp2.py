"""PyTorch FSDP2 over packed bytes: every parameter a row-sharded DTensor, gathered block by block.

Sharded: all parameters, in their own types - the packed uint8 rows of the frozen linears (scales
are inside them), the embeddings, norms and biases, the fp32 adapters - along rows, or along columns
where that pads less (``engine.shard_placement``). One block is one all-gather of bytes, so the wire
carries packed rows. There is no ``MixedPrecisionPolicy``: it would cast scales, and before torch
2.12 the bytes too.

Units: each decoder block; a trainable embedding or head; the root holds the rest (the final norm).
Frozen embeddings, heads and other large parameters outside of the blocks belong to
``engine.row_shards``, which gathers them in place: FSDP2 would have a buffer next to a whole head,
and keep a tied embedding or per-layer embeddings, which are the root's, whole for the step.

Two blocks take memory at any time, in forward and in backward: the current one, whole, and the
gather buffer of the next. FSDP2 would keep a third, the current one's buffer, until the next is
copied out, as another stream wrote it; all-gathers are therefore issued asynchronously from the
computing stream (``compat.gather_from_computing_stream``) and prefetched by name.

HSDP: with ``shard_group`` smaller than the world, rows are sharded inside each group of
consecutive ranks and the groups replicate; adapter gradients are reduce-scattered inside and
all-reduced across.

Gradients of each micro-batch are reduce-scattered, so that between micro-batches a rank keeps its
share of them, in float32 (``reduce_gradients: step`` keeps whole ones and reduces once a step).

Gradients are summed, never averaged (see ``engine.engine_protocol``).
"""

import copy
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather
from torch.distributed.tensor import DTensor, Shard

from dist_peft.core.config.run import EngineConfig
from dist_peft.core.span import Span
from dist_peft.core.trainable_steps import TrainableSteps
from dist_peft.core.world import World
from dist_peft.engine.chunk_gather import all_gather_chunks
from dist_peft.engine.compat import allow_integer_parameters, gather_from_computing_stream
from dist_peft.engine.engine_protocol import (
    OptimizerFactory,
    move_buffers_to_device,
    train_always,
)
from dist_peft.engine.exact_gradients import GradientRange, GradientScale, compute_exact_norm
from dist_peft.engine.expert_factors import shard_expert_factors, sum_over_replicas
from dist_peft.engine.integer_reduce_scatter import IntegerReduceScatter
from dist_peft.engine.mesh import build_shard_mesh, list_end_modules
from dist_peft.engine.optimizer import LocalOptimizer
from dist_peft.engine.row_shards import RowShardedParameters
from dist_peft.engine.shard_placement import ShardPlacement, choose_shard_placement
from dist_peft.model.adapter_module import RowUpdate
from dist_peft.model.parameter_readers import list_unread_parameters

__all__ = ["Fsdp2Engine"]


class _CountingAllGather(AllGather):
    """The default all-gather, counting the bytes each rank receives."""

    def __init__(self) -> None:
        self.bytes = 0

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        self.bytes += output_tensor.numel() * output_tensor.element_size()
        return all_gather_chunks(output_tensor, input_tensor, group, async_op)


class Fsdp2Engine:
    """Base and adapters as FSDP2 shards, each block a unit."""

    def __init__(
        self,
        config: EngineConfig,
        world: World,
        device: torch.device,
        scale: GradientScale | None = None,
    ) -> None:
        """Make the engine; with a ``scale``, gradients are summed as integers (``train.exact``)."""
        self.device = device
        self._scale = scale
        self._range = GradientRange(device)
        self._reductions: list[IntegerReduceScatter] = []
        self.config = config
        self.mesh = build_shard_mesh(config, world, device)
        self.shard_group = self.mesh.get_group("shard")
        self.shards = self.mesh["shard"].size()
        self.shard_index = self.mesh["shard"].get_local_rank()
        self.outer = RowShardedParameters(
            self.shard_group,
            device,
            resting_device=torch.device("cpu") if config.cpu_offload == "params" else device,
            experts=config.gather_experts,
        )
        """Frozen parameters outside of the blocks, and experts that are not gathered with them."""
        self._counter = _CountingAllGather()
        self._exchanging: Sequence[nn.Module] = ()
        self._units: list[FSDPModule] = []
        self._kept: list[FSDPModule] = []
        self._optimizer: LocalOptimizer | None = None
        self._is_part = False

    @property
    def bytes_gathered(self) -> int:
        return self._counter.bytes + self.outer.bytes_gathered

    # -- before training -----------------------------------------------------------------------

    def shard_model(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        allow_integer_parameters()
        move_buffers_to_device(model, self.device)
        ignored = set(list_unread_parameters(model).values())
        if self.config.shard_base:
            ignored |= set(self.outer.shard_outer_units(model))
            if self.config.gather_experts != "all":
                ignored |= set(self.outer.shard_experts(blocks))
            if self.config.gather_experts == "tokens":
                self._exchanging = blocks
                ignored |= set(shard_expert_factors(blocks, self.mesh, self.outer))
        else:
            ignored |= {p for p in model.parameters() if not p.requires_grad}
        ends = _list_own_ends(model, ignored)
        offload = CPUOffloadPolicy() if self.config.cpu_offload == "params" else OffloadPolicy()
        for module in [*blocks, *ends, model]:
            unit = fully_shard(
                module,
                mesh=self.mesh,
                # the root's rest is used at both ends of a step: gathered once for both
                reshard_after_forward=True if module is not model else None,
                offload_policy=offload,
                ignored_params=ignored,
                shard_placement_fn=self._choose_placement,
            )
            unit.set_custom_all_gather(self._counter)
            # the loss has the global token count: summed, not averaged, and by a plain sum, since a
            # scaling reduction is NCCL's alone
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            self._units.append(unit)
        self._reduce_integers()
        head = model.get_output_embeddings()  # type: ignore[operator]
        for module, unit in zip(ends, self._units[len(blocks) : -1], strict=True):
            if (
                module is head
            ):  # used at the end of forward and the start of backward: gathered once
                unit.set_reshard_after_forward(False, recurse=False)
                module.register_forward_hook(_reshard_after_evaluation)
        self._kept = self._units[: min(self.config.keep_gathered, len(blocks))]
        for unit in self._kept:
            unit.set_reshard_after_forward(False, recurse=False)
        ahead = self._units[: len(blocks)]
        # the next block's bytes travel while this one computes; backward does so by itself
        for block, following in itertools.pairwise(ahead):
            block.set_modules_to_forward_prefetch([following])
        gather_from_computing_stream(self._units[-1])

    def _reduce_integers(self) -> None:
        if self._scale is None:
            return
        is_kept_whole = self.config.reduce_gradients == "step"
        for unit in self._units:
            reduction = IntegerReduceScatter(self._scale, self._range, is_kept_whole)
            unit.set_custom_reduce_scatter(reduction)
            self._reductions.append(reduction)

    def _choose_placement(self, parameter: nn.Parameter) -> Shard:
        return Shard(choose_shard_placement(parameter, self.shards).dimension)

    def _find_placement(self, parameter: DTensor) -> ShardPlacement:
        return choose_shard_placement(parameter, self.shards)

    def local_row_span(self, parameter: Tensor) -> Span:
        if self.outer.is_row_sharded(parameter):
            return self.outer.local_row_span(parameter)
        if not isinstance(parameter, DTensor):
            return Span(0, parameter.shape[0])
        return self._find_placement(parameter).wanted_rows(self.shard_index)

    def fill_local_rows(self, owner: nn.Module, name: str, rows: Tensor) -> None:
        self._reshard_modules()
        old = owner._parameters[name]
        assert old is not None and rows.dtype == old.dtype and rows.shape[1:] == old.shape[1:]
        if self.outer.is_row_sharded(old):
            self.outer.fill_local_rows(owner, name, rows)
            return
        assert len(rows) == len(self.local_row_span(old)), (
            f"{name}: {len(rows)} rows for {self.local_row_span(old)}"
        )
        if isinstance(old, DTensor):
            rows = self._find_placement(old).cut_columns(rows, self.shard_index)
        if isinstance(old, DTensor) and not old.is_meta:
            # FSDP2 keeps views of the shard from the first forward on, so the object stays
            with torch.no_grad():
                old.to_local().copy_(rows)
            return
        offloaded = self.config.cpu_offload == "params" and isinstance(old, DTensor)
        data: Tensor = rows.to("cpu" if offloaded else self.device).contiguous()
        if isinstance(old, DTensor):
            data = self._wrap_as_dtensor(data, old)
        owner.register_parameter(name, nn.Parameter(data, requires_grad=old.requires_grad))

    def _reshard_modules(self) -> None:
        """Reshard the modules and free their gathered parameters.

        After a forward without backward (an evaluation, the probe) the parameters of the root and
        of ``keep_gathered`` blocks stay whole: the modules hold gathered copies, and the next
        forward computes with these copies, whatever was written into the shards in between.
        """
        for unit in self._units:
            unit.reshard()

    def _wrap_as_dtensor(self, local: Tensor, like: Tensor) -> Tensor:
        """A shard as DTensor with the global shape and the placement of ``like``."""
        assert isinstance(like, DTensor)
        return DTensor.from_local(
            local,
            self.mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )

    def setup_optimizer(
        self,
        model: nn.Module,
        factory: OptimizerFactory,
        lr_scale: Callable[[str], float],
        trainable_steps: Callable[[str], TrainableSteps] = train_always,
    ) -> nn.Module:
        self._reshard_modules()
        self._optimizer = LocalOptimizer(
            model,
            factory,
            lr_scale,
            local=_to_local_tensor,
            wrap=self._wrap_as_dtensor,
            total=self._sum_over_mesh,
            trainable_steps=trainable_steps,
            measure_norm=None if self._scale is None else self._measure_exact_norm,
        )
        return model

    @property
    def optimizer(self) -> LocalOptimizer:
        assert self._optimizer is not None, "optimize() comes first"
        return self._optimizer

    def split_optimizer(self) -> "Fsdp2Engine":
        part = copy.copy(self)
        part._optimizer, part._is_part = None, True
        return part

    # -- training ------------------------------------------------------------------------------

    def backward(self, loss: Tensor, last: bool) -> None:
        # integers are summed in the reduction, which then sees every micro-batch
        in_reduction = self._scale is not None
        reduces = last or in_reduction or self.config.reduce_gradients == "micro_batch"
        for reduction in self._reductions:
            reduction.is_last = last
        for unit in self._units:
            unit.set_requires_gradient_sync(reduces, recurse=False)
            # HSDP: groups add up their own shares and exchange them once a step
            unit.set_requires_all_reduce(last, recurse=False)
            unit.set_is_last_backward(reduces)
        for unit in self._kept:  # until the step changes the adapters among their parameters
            unit.set_reshard_after_backward(last, recurse=False)
        loss.backward()
        sum_over_replicas(self._exchanging if last else (), self.mesh)

    def step(self, lr: float, max_norm: float) -> float:
        if self._is_part:  # another part may have been evaluated since the backward pass
            self._reshard_modules()
        return self.optimizer.step(lr, max_norm)

    def keeps_parts_in_range(self) -> bool:
        if self._scale is None:
            return True
        largest = torch.tensor(self._range.take_largest(), dtype=torch.float64, device=self.device)
        self._reduce_over_mesh(largest, dist.ReduceOp.MAX)
        if float(largest) <= self._scale.limit:
            return True
        for parameter in cast(nn.Module, self._units[-1]).parameters():
            parameter.grad = None
        return False

    def _measure_exact_norm(self, grads: list[Tensor]) -> float:
        assert self._scale is not None
        largest = self._range.take_largest()
        return compute_exact_norm(grads, largest, self._scale, self._reduce_over_mesh)

    def _reduce_over_mesh(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        dist.all_reduce(tensor, op, group=self.shard_group)

    # -- state ---------------------------------------------------------------------------------

    def training_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        self._reshard_modules()
        return self.optimizer.training_state_dict()

    def training_state_shards(self, model: nn.Module) -> dict[str, Tensor]:
        return self.training_state_dict(model)

    def load_training_state_dict(
        self,
        model: nn.Module,
        state: Mapping[str, Tensor],
        step: int,
        skipped: Collection[int] = (),
    ) -> None:
        self._reshard_modules()
        self.optimizer.load_training_state_dict(state, step, skipped)

    def gather_parameter(self, parameter: Tensor) -> Tensor:
        if self.outer.is_row_sharded(parameter):
            return self.outer.gather_parameter(parameter).cpu()
        data = parameter.detach()
        whole = data.full_tensor() if isinstance(data, DTensor) else data
        assert whole.shape == parameter.shape, f"gathered {whole.shape} for {parameter.shape}"
        return whole.cpu()

    def gather_matching_rows(self, parameter: Tensor, like: Tensor) -> Tensor:
        placed = [t for t in (parameter, like) if isinstance(t, DTensor)]
        if len(placed) == 2 and all(self._find_placement(t).dimension == 0 for t in placed):
            return _to_local_tensor(parameter.detach()).cpu()  # cut by one rule
        return self.gather_parameter(parameter)[self.local_row_span(like).slice]

    def gather_moment(self, name: str, key: str) -> Tensor:
        moment = self.optimizer.get_moment(name, key)
        return (moment.full_tensor() if isinstance(moment, DTensor) else moment).cpu()

    @torch.no_grad()
    def overwrite_parameter(self, name: str, value: Tensor) -> None:
        self._reshard_modules()
        parameter = self.optimizer.parameters[name]
        if isinstance(parameter, DTensor):
            rows = value[self.local_row_span(parameter).slice]
            value = self._find_placement(parameter).cut_columns(rows, self.shard_index)
        _to_local_tensor(parameter).copy_(value)

    @torch.no_grad()
    def overwrite_local_rows(self, updates: Iterable[RowUpdate]) -> None:
        self._reshard_modules()
        for owner, name, rows in updates:
            frozen = getattr(owner, name)
            if self.outer.is_row_sharded(frozen):
                self.outer.overwrite_local_rows(frozen, rows)
            else:  # FSDP2 keeps views of the shard
                _to_local_tensor(frozen).copy_(rows)

    def get_local_bytes(self, parameter: Tensor) -> Tensor | None:
        known = self.outer.is_row_sharded(parameter)
        return self.outer.get_local_bytes(parameter) if known else None

    def sum_over_shards(self, tensor: Tensor) -> Tensor:
        if not self.config.shard_base:
            return tensor  # every rank has all rows and computed the whole sum itself
        return self._sum_over_mesh(tensor)

    def _sum_over_mesh(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total, group=self.shard_group)
        return total


def _list_own_ends(model: nn.Module, ignored: Collection[nn.Parameter]) -> list[nn.Module]:
    """Return embedding and head where these have parameters to shard; tied ones are the root's."""
    own = {m: {p for p in m.parameters() if p not in ignored} for m in list_end_modules(model)}
    shared = set.intersection(*own.values()) if len(own) > 1 else set()
    return [module for module, parameters in own.items() if parameters and not shared]


def _reshard_after_evaluation(module: nn.Module, inputs: object, output: object) -> None:
    """Reshard a head for which no backward will do it."""
    if not torch.is_grad_enabled():
        assert isinstance(module, FSDPModule)
        module.reshard()


def _to_local_tensor(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
