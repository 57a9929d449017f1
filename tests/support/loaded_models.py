"""Models of unquantized or quantized directories, loaded in one process."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_peft.core.config.run import BaseConfig
from dist_peft.engine.single import SingleEngine
from dist_peft.model.load import load_model
from dist_peft.model.skeleton import Skeleton, build_skeleton
from dist_peft.store.reader import RowReader

CPU = torch.device("cpu")


def load(directory: Path, **changes: Any) -> Skeleton:
    fields = {"path": str(directory), "quant": None, "compute_dtype": "float32"} | changes
    skeleton = build_skeleton(BaseConfig(**fields), directory)
    engine = SingleEngine(CPU)
    engine.shard_model(skeleton.model, skeleton.blocks)
    with RowReader(skeleton.index) as reader:
        load_model(skeleton.model, reader, engine, CPU)
    return skeleton


def logits(model: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


IDS = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(0))
