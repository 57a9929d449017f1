"""A run whose base GPTQ quantizes in a moment, and ``quantize_base`` for it."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dist_peft.app.quantized_base import quantize_base
from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World
from tests.support.tiny_runs import save_records, tiny_tree

GPTQ: dict[str, Any] = {
    "kind": "int",
    "bits": 3,
    "group_size": 16,
    "solver": "gptq",
    "calibration_samples": 3,  # on 2 ranks one of them has one more
    "calibration_tokens": 24,
}


def make_gptq_tree(directory: Path) -> dict[str, Any]:
    """A configuration with solver gptq, whose files exist under ``directory``."""
    made = tiny_tree(directory, base__quant=GPTQ, data__seq_len=32)
    made["base"]["compute_dtype"] = "bfloat16"
    save_records(directory / "train.jsonl", 30, 10)
    return made


def write_quantized(world: World, tree: dict[str, Any], out: Path) -> dict[str, torch.Tensor]:
    """Quantize the base of ``tree`` into ``out`` and return its tensors."""
    quantize_base(parse_config(tree), out, world, torch.device("cpu"))
    return load_file(out / "model.safetensors")
