"""Engines for a traced step: the real ones, but for DeepSpeed's part of ``zero``.

DeepSpeed cannot run on fake tensors. What it keeps is counted in ``plan.resting``; the base under
``zero`` is sharded by ``engine.row_shards``, which runs here as it does in ``ZeroEngine``, and the
adapters are whole, as they are when a block computes.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_peft.core.config.run import RunConfig
from dist_peft.core.span import Span
from dist_peft.core.trainable_steps import TrainableSteps
from dist_peft.core.world import World
from dist_peft.engine import Engine, make_engine, resolve_engine_kind
from dist_peft.engine.engine_protocol import (
    OptimizerFactory,
    move_buffers_to_device,
    train_always,
)
from dist_peft.engine.mesh import build_shard_mesh
from dist_peft.engine.row_shards import RowShardedParameters
from dist_peft.engine.single import SingleEngine

__all__ = ["StatelessFactory", "make_traced_engine"]


def make_traced_engine(config: RunConfig, world: World, device: torch.device) -> Engine:
    """Return the engine of the run, whose shards rest on ``device``."""
    settings = config.engine.model_copy(update={"cpu_offload": "none"})
    if resolve_engine_kind(settings, world) == "zero":
        return _RowShardEngine(config, world, device)
    return make_engine(settings, config.train, world, device)


class _RowShardEngine(SingleEngine):
    """``zero`` without DeepSpeed: the base in row shards, the trainable parameters whole."""

    def __init__(self, config: RunConfig, world: World, device: torch.device) -> None:
        self._shards: RowShardedParameters | None = None
        super().__init__(device)
        if config.engine.shard_base:
            mesh = build_shard_mesh(config.engine, world, device)
            group = mesh.get_group("shard")
            self._shards = RowShardedParameters.from_config(config.engine, group, device)

    @property
    def bytes_gathered(self) -> int:
        return 0 if self._shards is None else self._shards.bytes_gathered

    @bytes_gathered.setter
    def bytes_gathered(self, value: int) -> None:
        assert value == 0

    def shard_model(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        move_buffers_to_device(model, self.device)
        if self._shards is not None:
            self._shards.shard_model(model, blocks)

    def local_row_span(self, parameter: Tensor) -> Span:
        if self._shards is not None and self._shards.is_row_sharded(parameter):
            return self._shards.local_row_span(parameter)
        return super().local_row_span(parameter)

    def fill_local_rows(self, owner: nn.Module, name: str, rows: Tensor) -> None:
        old = owner._parameters[name]
        assert old is not None
        if self._shards is not None and self._shards.is_row_sharded(old):
            self._shards.fill_local_rows(owner, name, rows)
        else:
            super().fill_local_rows(owner, name, rows)

    def setup_optimizer(
        self,
        model: nn.Module,
        factory: OptimizerFactory,
        lr_scale: Callable[[str], float],
        trainable_steps: Callable[[str], TrainableSteps] = train_always,
    ) -> nn.Module:
        if self._shards is not None:
            self._shards.unshard_trainable()
        return super().setup_optimizer(model, factory, lr_scale, trainable_steps)


class StatelessFactory:
    """An optimizer without state: its bytes are counted exactly elsewhere."""

    wants_plain = False
    moment_names: tuple[str, ...] = ()

    def build_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=1e-4, foreach=True)

    def read_moments(self, optimizer: Any, parameter: Tensor) -> dict[str, Tensor]:
        return {}

    def write_moments(
        self, optimizer: Any, parameter: Tensor, moments: Mapping[str, Tensor]
    ) -> None:
        pass

    def set_num_steps(self, optimizer: Any, step: int, skipped: Collection[int] = ()) -> None:
        pass
