"""One process, nothing sharded: the reference that the other engines are compared with."""

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dist_peft.core.span import Span
from dist_peft.core.trainable_steps import TrainableSteps
from dist_peft.engine.engine_protocol import (
    OptimizerFactory,
    move_buffers_to_device,
    train_always,
)
from dist_peft.engine.exact_gradients import (
    FixedPointGradients,
    GradientScale,
    compute_exact_norm,
)
from dist_peft.engine.optimizer import LocalOptimizer
from dist_peft.model.adapter_module import RowUpdate

__all__ = ["SingleEngine"]


class SingleEngine:
    """Every row is this process's. See ``engine.engine_protocol.Engine``."""

    def __init__(self, device: torch.device, scale: GradientScale | None = None) -> None:
        """Make the engine; with a ``scale``, gradients are summed as integers (``train.exact``)."""
        self.device = device
        self._scale = scale
        self._sums: FixedPointGradients | None = None
        self.bytes_gathered = 0
        self._optimizer: LocalOptimizer | None = None
        self._parts: list[SingleEngine] = []

    def shard_model(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        move_buffers_to_device(model, self.device)

    def local_row_span(self, parameter: Tensor) -> Span:
        return Span(0, parameter.shape[0])

    def fill_local_rows(self, owner: nn.Module, name: str, rows: Tensor) -> None:
        old = owner._parameters[name]
        assert old is not None and rows.shape == old.shape and rows.dtype == old.dtype
        new = nn.Parameter(rows.to(self.device).contiguous(), requires_grad=old.requires_grad)
        owner.register_parameter(name, new)

    def setup_optimizer(
        self,
        model: nn.Module,
        factory: OptimizerFactory,
        lr_scale: Callable[[str], float],
        trainable_steps: Callable[[str], TrainableSteps] = train_always,
    ) -> nn.Module:
        self._optimizer = LocalOptimizer(
            model,
            factory,
            lr_scale,
            local=_same,
            wrap=lambda t, like: t,
            total=_same,
            trainable_steps=trainable_steps,
            measure_norm=None if self._scale is None else self._measure_exact_norm,
        )
        if self._scale is not None:
            sizes = [parameter.numel() for parameter in self._optimizer.parameters.values()]
            self._sums = FixedPointGradients(sizes, self._scale, self.device)
        return model

    @property
    def optimizer(self) -> LocalOptimizer:
        assert self._optimizer is not None, "optimize() comes first"
        return self._optimizer

    def split_optimizer(self) -> "SingleEngine":
        part = copy.copy(self)
        part._optimizer, part._parts = None, []
        self._parts.append(part)
        return part

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()
        for part in self._parts or [self]:
            part._end_micro_batch(last)

    def keeps_parts_in_range(self) -> bool:
        return True  # each has sums of its own

    def _end_micro_batch(self, last: bool) -> None:
        if self._sums is None:
            return
        parameters = self.optimizer.parameters.values()
        self._sums.add_micro_batch([p.grad for p in parameters])
        sums = self._sums.take_sums(None) if last else [None] * len(parameters)
        for parameter, value in zip(parameters, sums, strict=True):
            parameter.grad = None if value is None else value.view_as(parameter)

    def step(self, lr: float, max_norm: float) -> float:
        return self.optimizer.step(lr, max_norm)

    def _measure_exact_norm(self, grads: list[Tensor]) -> float:
        assert self._sums is not None and self._scale is not None
        return compute_exact_norm(grads, self._sums.range.take_largest(), self._scale, None)

    def training_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
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
        self.optimizer.load_training_state_dict(state, step, skipped)

    def gather_parameter(self, parameter: Tensor) -> Tensor:
        return parameter.detach().cpu()

    def gather_matching_rows(self, parameter: Tensor, like: Tensor) -> Tensor:
        return parameter.detach()[self.local_row_span(like).slice].cpu()

    def gather_moment(self, name: str, key: str) -> Tensor:
        return self.optimizer.get_moment(name, key).cpu()

    @torch.no_grad()
    def overwrite_parameter(self, name: str, value: Tensor) -> None:
        self.optimizer.parameters[name].copy_(value)

    @torch.no_grad()
    def overwrite_local_rows(self, updates: Iterable[RowUpdate]) -> None:
        for owner, name, rows in updates:
            getattr(owner, name).copy_(rows)

    def get_local_bytes(self, parameter: Tensor) -> Tensor | None:
        return None

    def sum_over_shards(self, tensor: Tensor) -> Tensor:
        return tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor
