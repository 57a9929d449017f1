"""Engines: who keeps which rows, and how bytes reach the place where they are needed."""

import torch

from dist_peft.core.config.run import EngineConfig, TrainConfig
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.engine.engine_protocol import Engine
from dist_peft.engine.exact_gradients import GradientScale
from dist_peft.engine.fsdp2 import Fsdp2Engine
from dist_peft.engine.single import SingleEngine
from dist_peft.engine.zero import ZeroEngine

__all__ = ["Engine", "make_engine", "resolve_engine_kind"]


def resolve_engine_kind(config: EngineConfig, world: World) -> str:
    """Resolve ``auto``: single with one process, zero under deepspeed's launcher, else fsdp2.

    Raises:
        UserError: the kind does not fit the number of processes.
    """
    if config.kind == "auto":
        if world.size == 1:
            return "single"
        return "zero" if world.launcher == "deepspeed" else "fsdp2"
    if config.kind == "single" and world.size > 1:
        raise UserError(
            f"engine.kind is single but {world.launcher} started {world.size} processes; "
            "use engine.kind: auto, fsdp2 or zero, or start one process"
        )
    if config.kind != "single" and world.size == 1:
        raise UserError(
            f"engine.kind is {config.kind} but there is one process; use single or auto"
        )
    return config.kind


def make_engine(
    config: EngineConfig, train: TrainConfig, world: World, device: torch.device
) -> Engine:
    """The engine of the run. Call after ``world.connect``."""
    kind = resolve_engine_kind(config, world)
    scale = GradientScale.from_config(train) if train.exact else None
    if kind == "single":
        return SingleEngine(device, scale)
    if kind == "zero":
        return ZeroEngine(config, train, world, device)
    if config.cpu_offload == "optimizer":
        raise UserError("engine.cpu_offload: optimizer is zero's; with fsdp2 use params")
    return Fsdp2Engine(config, world, device, scale)
