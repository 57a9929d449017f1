"""A base loaded on each rank, with the bytes that the rank read."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_peft.adapters.lora.method import LoraAdapter
from dist_peft.core.config.run import BaseConfig, EngineConfig, LoraConfig, QuantConfig
from dist_peft.core.span import row_span
from dist_peft.core.world import World
from dist_peft.engine import Engine
from dist_peft.engine.fsdp2 import Fsdp2Engine
from dist_peft.engine.single import SingleEngine
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.load import load_model
from dist_peft.model.skeleton import build_skeleton
from dist_peft.store.reader import RowReader

CPU = torch.device("cpu")


@dataclass
class Loaded:
    bytes_read: int
    largest_read: int
    local: dict[str, Tensor]
    packed: set[str]
    progress: list[int]


def load(
    world: World, directory: Path, quant: QuantConfig | None, lora: LoraConfig | None = None
) -> Loaded:
    skeleton = build_skeleton(
        BaseConfig(path=str(directory), quant=quant, compute_dtype="float32"), directory
    )
    model = skeleton.model
    if lora is not None:
        LoraAdapter(lora, seed=0, arithmetic=torch.float32).attach_to_model(model)
    engine = SingleEngine(CPU) if world.size == 1 else Fsdp2Engine(EngineConfig(), world, CPU)
    engine.shard_model(model, skeleton.blocks)
    progress: list[int] = []
    with RowReader(skeleton.index) as reader, world.raise_together("load base"):
        load_model(model, reader, engine, CPU, progress.append)
    local = {name: copy_own_rows(engine, p) for name, p in model.named_parameters()}
    packed = {f"{n}.packed" for n, m in model.named_modules() if isinstance(m, FrozenLinear)}
    return Loaded(reader.bytes_read, reader.largest_read, local, packed, progress)


def copy_own_rows(engine: Engine, parameter: Tensor) -> Tensor:
    """This rank's rows of a parameter; the storage of a row-sharded one is empty."""
    own = engine.get_local_bytes(parameter)
    if own is not None:
        return own.clone().view(parameter.dtype).view(-1, *parameter.shape[1:])
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach().clone()


def share(directory: Path, ranks: int, rank: int) -> list[int]:
    """Bytes of a rank's rows of each tensor in the files."""
    return [
        len(row_span(t.shape[0], ranks, rank)) * t[:1].numel() * t.element_size()
        for t in load_file(directory / "model.safetensors").values()
    ]
