"""Models of unquantized or quantized directories, loaded in one process."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_peft.core.config.run import BaseConfig
from dist_peft.engine.single import SingleEngine
from dist_peft.model.experts import ExpertStack
from dist_peft.model.frozen_linear import FrozenWeight
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


@torch.no_grad()
def copy_decoded(mine: nn.Module, original: nn.Module) -> None:
    """Give ``original``, of ``transformers``, the weights that ``mine`` decodes."""
    for path, module in mine.named_modules():
        if not isinstance(module, FrozenWeight):
            continue
        name = path if isinstance(module, ExpertStack) else f"{path}.weight"
        parameter = original.get_parameter(name)
        decoded = module.dequantize_weight(torch.float32).view(
            -1, module.rows_each, module.in_features
        )
        if module.is_transposed:
            decoded = decoded.transpose(1, 2)
        flat = decoded.reshape(-1, parameter.shape[-1])  # of the experts that have weights
        parameter.view(-1, parameter.shape[-1])[: len(flat)] = flat


def logits(model: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


IDS = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(0))
