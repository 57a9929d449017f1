"""Norms of an adapter by block, read from its directory: how far training has moved each.

Of a LoRA pair the change of the weight is ``s B A``, ``A [r, in]``, ``B [out, r]``, and its
Frobenius norm needs no ``[out, in]`` matrix ::

    ||B A||^2 = trace(A^T B^T B A) = sum((B^T B) * (A A^T))        both [r, r]

Magnitudes of DoRA are not part of it. Of other methods' tensors it is that of the tensors
themselves. Norms of one block's tensors, and of its experts, are added as squares.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_peft.adapters.full.format import contains_trained_weights
from dist_peft.adapters.lora.tensors import LoraTensors, parse_lora_tensors
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.errors import UserError

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
    a pair that its configuration does not describe, or no tensor inside a block.
    """
    if not directory.is_dir() or contains_trained_weights(directory):
        return None
    squares: dict[int, float] = defaultdict(float)
    pairs = 0
    try:
        settings = _read_settings(directory)
        for file in sorted(directory.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                found, products = _add_squares(tensors, settings)
            pairs += products
            for block, square in found.items():
                squares[block] += square
    except (OSError, ValueError, SafetensorError, UserError):
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


def _add_squares(tensors: Any, settings: dict[str, Any]) -> tuple[dict[int, float], int]:
    """Return squared norms by block of a file's tensors, and the number of pairs among them.

    Tensors of one module are in memory at a time.
    """
    has_pairs = settings.get("peft_type") == "LORA"
    modules: dict[str, list[str]] = defaultdict(list)
    for name in sorted(tensors.keys()):
        path, is_pair, _ = name.rpartition(".lora_")
        if _BLOCK.search(name) and (is_pair or not has_pairs):
            modules[path if has_pairs else name].append(name)
    squares: dict[int, float] = defaultdict(float)
    pairs = 0
    for path, names in modules.items():
        own = {name: tensors.get_tensor(name) for name in names}
        if has_pairs:
            (module,) = parse_lora_tensors(PublicAdapter(settings, own)).values()
            norms = [module.scaling * norm for norm in _iterate_product_norms(module)]
            pairs += len(norms)
        else:
            norms = [float(torch.linalg.vector_norm(tensor.double())) for tensor in own.values()]
        found = _BLOCK.search(path)
        assert found is not None
        squares[int(found.group(1))] += sum(norm**2 for norm in norms)
    return squares, pairs


def _iterate_product_norms(module: LoraTensors) -> Iterator[float]:
    """Yield the norm of ``B A``, of each expert of a stack."""
    pairs = zip(
        module.B.chunk(module.experts), module.expanded_lora_A().chunk(module.experts), strict=True
    )
    for b, a in pairs:
        yield compute_product_norm(b, a)
