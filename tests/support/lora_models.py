"""Variants of LoRA, and trained models of them."""

from pathlib import Path
from typing import Any

from torch import nn

from dist_peft.adapters.directory import open_adapter_merger
from dist_peft.adapters.lora.merge import LoraMerger
from dist_peft.quant.codec import Codec
from tests.support.adapters import (
    RAW,
    adapted,
    disturb,
    save,
    tiny_llama,
)

PATTERNS = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\..*": 6},
    "alpha_pattern": {"mlp.up_proj": 10.0, "k_proj": 3.5},
}


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dropout": {"dropout": 0.1},
    "rslora": {"use_rslora": True},
    "patterns": PATTERNS,
    "patterns-rslora": {**PATTERNS, "use_rslora": True},
    "dora": {"use_dora": True},
    "dora-patterns": {"use_dora": True, **PATTERNS},
    "list": {"target_modules": ["q_proj", "mlp.up_proj"]},
    "expression": {"target_modules": [r".*layers\.1.*\.(q|o)_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embeddings": {"embeddings": True},
    "pissa": {"init": "pissa"},
    "pissa-rslora": {"init": "pissa", "use_rslora": True},
    "pissa-patterns": {"init": "pissa", **PATTERNS},
    "pissa-patterns-rslora": {"init": "pissa", **PATTERNS, "use_rslora": True},
    "pissa-dora": {"init": "pissa", "use_dora": True},
    "pissa-embeddings": {
        "init": "pissa",
        "embeddings": True,
        "rank_pattern": {"embed_tokens": 3, ".*proj": 5},
    },
}


Q = "model.layers.0.self_attn.q_proj.weight"


def trained(
    directory: Path, codec: Codec = RAW, **settings: Any
) -> tuple[nn.Module, nn.Module, LoraMerger]:
    """(original, trained model, merger)"""
    original = tiny_llama(bias=True)
    model, adapter = adapted(original, codec, r=4, alpha=6, **settings)
    disturb(model)
    return original, model.eval(), open_adapter_merger(save(model, adapter, directory))
