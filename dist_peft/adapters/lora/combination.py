"""Several LoRA adapters of one base become one: linear, TIES, DARE.

Each adapter changes a weight by ``D_i = s_i B_i A_i``; ``w_i`` is its weight::

    linear   sum_i w_i D_i                                        (task arithmetic)
    ties     1. trim: keep the ``density`` largest entries of each w_i D_i, by size
             2. elect: the sign of the sum_i of the remaining values, entry by entry
             3. merge: the mean of the entries that have this sign
             (Yadav et al. 2023, "TIES-Merging", algorithm 1; trimmed weight by weight)
    dare     drop entries at random, keep ``density`` of them divided by ``density``, then sum
             (Yu et al. 2023, "Language Models are Super Mario", section 3.2)

The linear sum is again a product, of the sum of the ranks, and is written exactly::

    sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]

The others return a dense matrix; it, or a linear sum that is to have a lower rank, is replaced by
its leading singular components, and the share that these keep is reported.

PEFT's ``add_weighted_adapter`` works on the factors ``A`` and ``B`` one by one instead, except for
its ``cat`` and ``svd``: the product of two merged factors has cross terms ``B_1 A_2``.

Memory: one weight's dense changes, as many as there are adapters, in float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dist_peft.adapters.lora.format import LoraFormat
from dist_peft.adapters.lora.merge import THROUGH_KEY
from dist_peft.adapters.lora.tensors import (
    MASKED_TYPE,
    LoraTensors,
    build_peft_key,
    parse_lora_tensors,
)
from dist_peft.adapters.low_rank.row_sharded import LowRankFactors, compute_top_singular
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.errors import UserError
from dist_peft.core.seeds import derive_seed

__all__ = ["CombineRecipe", "combine_adapters"]

_POWER_ITERATIONS = 8


@dataclass(frozen=True)
class CombineRecipe:
    """How to combine.

    Attributes:
        method: linear, ties or dare; the module has the formulas.
        density: ties, dare: share of the entries kept, ``0 < density <= 1``.
        rank: of the result; None: the sum of the adapters' ranks.
        seed: dare: which entries are dropped.
    """

    method: Literal["linear", "ties", "dare"] = "linear"
    density: float = 0.5
    rank: int | None = None
    seed: int = 0


def combine_adapters(
    adapters: Mapping[str, PublicAdapter], weights: Sequence[float], recipe: CombineRecipe
) -> tuple[PublicAdapter, float]:
    """One adapter instead of several.

    Args:
        adapters: plain LoRA, by a name for messages; the first one's base is the result's.
        weights: one each.
        recipe: how.

    Returns:
        A LoRA adapter of scaling 1, and the share of the combined change that it holds: the ratio
        of squared norms over all weights, 1 where nothing had to be cut off.

    Raises:
        UserError: an adapter is not plain LoRA, or two do not fit the same base.
    """
    assert len(adapters) == len(weights)
    found = {name: _parse_plain_lora(name, public) for name, public in adapters.items()}
    paths = list(dict.fromkeys(path for own in found.values() for path in own))
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    kept = whole = 0.0
    for path in paths:
        present = [
            (own[path], w) for own, w in zip(found.values(), weights, strict=True) if path in own
        ]
        _check_equal_shapes(path, [f for f, _ in present])
        product, norm, cut = _combine_module(path, present, recipe)
        kept, whole = kept + norm - cut, whole + norm
        ranks[path] = product.A.shape[0]
        embedding = "_embedding" if present[0][0].is_embedding else ""
        tensors[build_peft_key(path, f"lora{embedding}_A")] = product.A.float().contiguous()
        tensors[build_peft_key(path, f"lora{embedding}_B")] = product.B.float().contiguous()
    config = _build_combined_config(next(iter(adapters.values())), paths, ranks)
    return PublicAdapter(config, tensors), kept / whole if whole else 1.0


def _combine_module(
    path: str, present: Sequence[tuple[LoraTensors, float]], recipe: CombineRecipe
) -> tuple[LowRankFactors, float, float]:
    """Return a weight's product, and the squared norms of the full change and of the residual."""
    stacked = LowRankFactors(
        torch.cat([f.A for f, _ in present]),
        torch.cat([w * f.scaling * f.B for f, w in present], 1),
    )
    most = min(stacked.A.shape[1], stacked.B.shape[0])
    rank = min(recipe.rank or stacked.A.shape[0], most)
    exact = recipe.method == "linear"
    if exact and recipe.rank is None:
        return stacked, 1.0, 0.0
    dense = (
        stacked.B.double() @ stacked.A.double()
        if exact
        else _combine_dense_changes(path, present, recipe)
    )
    seed = derive_seed(recipe.seed, path, "svd")
    product = compute_top_singular(
        dense, rank, iterations=_POWER_ITERATIONS, seed=seed, reduce=lambda total: total
    )
    norm = float(dense.square().sum())
    return product, norm, float((dense - product.B @ product.A).square().sum())


def _combine_dense_changes(
    path: str, present: Sequence[tuple[LoraTensors, float]], recipe: CombineRecipe
) -> Tensor:
    changes = torch.stack([w * f.scaling * (f.B.double() @ f.A.double()) for f, w in present])
    if recipe.method == "dare":
        generator = torch.Generator().manual_seed(derive_seed(recipe.seed, path))
        kept = torch.rand(changes.shape, generator=generator) < recipe.density
        return torch.where(kept, changes / recipe.density, 0.0).sum(0)
    changes = torch.stack([_trim_small_values(change, recipe.density) for change in changes])
    sign = changes.sum(0).sign()
    agreeing = torch.where((changes.sign() == sign) & (changes != 0), changes, 0.0)
    return agreeing.sum(0) / (agreeing != 0).sum(0).clamp_min(1)


def _trim_small_values(change: Tensor, density: float) -> Tensor:
    """The largest ``density`` of the entries, at least one; the others 0."""
    count = max(1, round(density * change.numel()))
    kept = change.abs().flatten().topk(count).indices
    result = torch.zeros_like(change).flatten()
    result[kept] = change.flatten()[kept]
    return result.view_as(change)


def _parse_plain_lora(name: str, public: PublicAdapter) -> dict[str, LoraTensors]:
    if not LoraFormat().matches(public.config):
        method = public.config.get("peft_type", "of AdapterHub's library")
        raise UserError(
            f"{name} is {method} and no LoRA; only LoRA adapters are combined: leave it out"
        )
    if public.config.get("peft_type") == MASKED_TYPE:
        raise UserError(
            f"{name} was trained with adapter.keep_zeros: its change depends on the base's zeros, "
            "so it cannot be combined; merge it into the base instead"
        )
    if public.config.get(THROUGH_KEY):
        raise UserError(
            f"{name} was trained through the quantizer, which rounds W + s B A as a whole: its "
            "change of the base is no product; merge its run instead"
        )
    found = parse_lora_tensors(public)
    for path, own in found.items():
        if own.magnitude is not None:
            raise UserError(
                f"{name} is a DoRA adapter: its change is no product, so it cannot be combined; "
                "merge it into the base instead"
            )
        if own.pool != 1:
            raise UserError(
                f"{name} is a QA-LoRA adapter; write it as plain LoRA first (dist-peft export "
                "--format peft-expanded)"
            )
        if own.experts > 1:
            raise UserError(
                f"{name} adapts experts ({path}), and such adapters are not combined; merge one "
                "into the base and train the next on that"
            )
        if own.saved_base is not None:
            raise UserError(f"{name} holds a copy of the base's {path}; save it without")
    return found


def _check_equal_shapes(path: str, present: Sequence[LoraTensors]) -> None:
    shapes = {own.shape for own in present}
    if len(shapes) > 1:
        sizes = " and ".join(str(list(shape)) for shape in sorted(shapes))
        raise UserError(f"the adapters fit different bases: {path} is {sizes}")


def _build_combined_config(
    first: PublicAdapter, paths: Sequence[str], ranks: Mapping[str, int]
) -> dict[str, object]:
    """PEFT's configuration: the same rank and alpha everywhere, or a pattern for each path."""
    values = set(ranks.values())
    most = max(values)
    pattern = {path: rank for path, rank in ranks.items() if rank != most}
    return {
        **first.config,
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "target_modules": list(paths),
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
