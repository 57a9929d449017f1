"""Norms of an adapter by block, read from its directory: how far training has moved each.

Of a LoRA pair the change of the weight is ``s B A``, ``A [r, in]``, ``B [out, r]``, and its
Frobenius norm needs no ``[out, in]`` matrix ::

    ||B A||^2 = trace(A^T B^T B A) = sum((B^T B) * (A A^T))        both [r, r]

Magnitudes of DoRA are not part of it. Of other methods' tensors, and of experts' pairs, which are
stacked, it is that of the tensors themselves. Norms of one block's tensors are added as squares.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_peft.adapters.full.format import contains_trained_weights

__all__ = ["LayerNorms", "compute_product_norm", "measure_layer_norms"]

_BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class LayerNorms:
    """Norms by block.

    Attributes:
        by_block: (number of the block, norm), rising; tensors outside of blocks are left out.
        meaning: the quantity that the norms are of.
    """

    by_block: list[tuple[str, float]]
    meaning: str


def measure_layer_norms(directory: Path) -> LayerNorms | None:
    """Return the norms of an adapter directory.

    None where there are none to show: no directory, weights of the base itself, an unreadable file,
    or no tensor inside a block.
    """
    if not directory.is_dir() or contains_trained_weights(directory):
        return None
    squares: dict[int, float] = defaultdict(float)
    pairs = 0
    try:
        settings = _read_settings(directory)
        for file in sorted(directory.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                found, products = _add_squares(tensors, set(tensors.keys()), settings)
            pairs += products
            for block, square in found.items():
                squares[block] += square
    except (OSError, ValueError, SafetensorError):
        return None
    if not squares or not all(map(math.isfinite, squares.values())):
        return None
    by_block = [(str(block), math.sqrt(squares[block])) for block in sorted(squares)]
    meaning = "norm of the weights' change" if pairs else "norm of the trained tensors"
    return LayerNorms(by_block, meaning)


def compute_product_norm(b: Tensor, a: Tensor) -> float:
    """Return the Frobenius norm of ``b @ a``; ``b [out, r]``, ``a [r, in]``."""
    b, a = b.double(), a.double()
    square = ((b.T @ b) * (a @ a.T)).sum()
    return math.sqrt(max(0.0, float(square)))


def _read_settings(directory: Path) -> dict[str, Any]:
    file = directory / "adapter_config.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found if isinstance(found, dict) else {}


def _add_squares(
    tensors: Any, names: set[str], settings: Mapping[str, Any]
) -> tuple[dict[int, float], int]:
    """Return squared norms by block of a file's tensors, and the number of pairs among them."""
    squares: dict[int, float] = defaultdict(float)
    pairs = 0
    has_pairs = settings.get("peft_type") == "LORA" and not settings.get("target_parameters")
    for name in sorted(names):
        block, partner = _BLOCK.search(name), name.replace(".lora_B.", ".lora_A.")
        is_pair = partner != name and partner in names
        if block is None or (has_pairs and not is_pair):
            continue
        tensor = tensors.get_tensor(name)
        if has_pairs:
            a = tensors.get_tensor(partner)
            norm = _choose_scale(settings, len(a)) * compute_product_norm(tensor, a)
            pairs += 1
        else:
            norm = float(torch.linalg.vector_norm(tensor.double()))
        squares[int(block.group(1))] += norm**2
    return squares, pairs


def _choose_scale(settings: Mapping[str, Any], r: int) -> float:
    alpha = float(settings.get("lora_alpha") or r)
    return alpha / (math.sqrt(r) if settings.get("use_rslora") else r)
