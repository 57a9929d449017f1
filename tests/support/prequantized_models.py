"""Models of prequantized directories, loaded in one process or on several ranks."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_peft.adapters.lora.method import LoraAdapter
from dist_peft.core.config.run import BaseConfig, EngineConfig, LoraConfig
from dist_peft.core.world import World
from dist_peft.engine.fsdp2 import Fsdp2Engine
from dist_peft.engine.single import SingleEngine
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.load import load_model
from dist_peft.model.skeleton import Skeleton, build_skeleton
from dist_peft.store.reader import RowReader

CPU = torch.device("cpu")


IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(0))


def fill(world: World, base: BaseConfig, adapter: LoraConfig | None = None) -> tuple[Skeleton, int]:
    """Load ``base``; gives the bytes that this rank read, too."""
    skeleton = build_skeleton(base, Path(base.path))
    if adapter is not None:
        LoraAdapter(adapter, seed=0, arithmetic=torch.float32).attach_to_model(skeleton.model)
    engine = SingleEngine(CPU) if world.size == 1 else Fsdp2Engine(EngineConfig(), world, CPU)
    engine.shard_model(skeleton.model, skeleton.blocks)
    with RowReader(skeleton.index) as reader, world.raise_together("load base"):
        load_model(skeleton.model, reader, engine, CPU)
    return skeleton, reader.bytes_read


def load(directory: Path, **options: Any) -> Skeleton:
    return fill(World(), base_of(directory, **options))[0]


def base_of(directory: Path, **options: Any) -> BaseConfig:
    return BaseConfig(**{"path": str(directory), "compute_dtype": "float32", **options})


def linears(skeleton: Skeleton) -> dict[str, FrozenLinear]:
    """Of the blocks, by their weight's name."""
    modules = skeleton.model.modules()
    return {m.source: m for m in modules if isinstance(m, FrozenLinear) and not m.is_head}


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits
