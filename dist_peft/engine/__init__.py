"""Engines: who keeps which rows, and how bytes reach the place where they are needed."""

import torch

from dist_peft.core.config import EngineConfig
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.engine.base import Engine
from dist_peft.engine.fsdp2 import Fsdp2Engine
from dist_peft.engine.single import SingleEngine

__all__ = ["Engine", "engine_kind", "make_engine"]


def engine_kind(config: EngineConfig, world: World) -> str:
    """Resolve ``auto``: fsdp2 with more than one process, else single."""
    if config.kind == "auto":
        return "fsdp2" if world.size > 1 else "single"
    if config.kind == "single" and world.size > 1:
        raise UserError(
            f"engine.kind is single but {world.launcher} started {world.size} processes; "
            "use engine.kind: auto or fsdp2, or start one process"
        )
    return config.kind


def make_engine(config: EngineConfig, world: World, device: torch.device) -> Engine:
    """The engine of the run. Call after ``world.connect``."""
    if engine_kind(config, world) == "single":
        return SingleEngine(device)
    if world.size == 1:
        raise UserError("engine.kind is fsdp2 but there is one process; use single or auto")
    return Fsdp2Engine(config, world, device)
