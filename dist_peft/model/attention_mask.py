"""Attention masks of packed sequences, in which documents must not attend to each other.

A packed sequence holds several documents; their position ids restart at 0. From that
``transformers`` builds a block-diagonal causal mask (or cumulative lengths for variable-length
flash attention), combined with sliding windows where a layer has one. A few families do not look at
the positions there; they get the mask explicitly. ``documents_are_isolated`` does not rely on
either: it compares logits.

Positions cannot describe a prefix that every document sees (prefix-tuning), so a packed sequence
with a prefix of ``P`` always gets its mask explicitly (``build_prefix_mask``)::

                  prefix   document 1   document 2
    document 1    1 1      1 . .        . .
                  1 1      1 1 .        . .
                  1 1      1 1 1        . .
    document 2    1 1      . . .        1 .
                  1 1      . . .        1 1
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dist_peft.model.document_attention import DOCUMENT_ATTENTION, build_document_masks
from dist_peft.model.experts import FrozenExperts
from dist_peft.model.rotary import list_switch_lengths
from dist_peft.model.skeleton import parse_torch_dtype

__all__ = [
    "build_document_mask",
    "build_model_inputs",
    "build_packing_mask",
    "build_prefix_mask",
    "documents_are_isolated",
    "is_packed_sequence",
]

_LEAK, _FLOAT32, _HALF = 1e-5, 1e-4, 5e-2
"""Tolerance of logits relative to the largest one: for the same operations, for others in float32,
and in half precision."""

_NEED_EXPLICIT_MASK = {"opt"}
"""Model types that build their causal mask without looking at the position ids."""


def build_model_inputs(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    is_packed: bool = True,
) -> dict[str, Any]:
    """Return keyword arguments of the forward pass for sequences ``[B, S]``.

    Args:
        is_packed: false: a sequence holds one document and its padding.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids}
    mask = build_packing_mask(model, position_ids, is_packed)
    return inputs if mask is None else {**inputs, "attention_mask": mask}


def build_packing_mask(
    model: nn.Module, position_ids: Tensor, is_packed: bool = True
) -> Tensor | dict[str, Tensor] | None:
    """Return the mask of sequences ``[B, S]`` for models that do not derive it from positions.

    That is the boundaries of documents where the model has document attention, and
    ``build_document_mask`` for a few families; else None.
    """
    config: Any = model.config
    if config._attn_implementation == DOCUMENT_ATTENTION:
        return build_document_masks(model, position_ids, is_packed)
    if config.model_type not in _NEED_EXPLICIT_MASK or not is_packed_sequence(position_ids):
        return None
    # a name after save_pretrained has made the configuration JSON
    dtype = parse_torch_dtype(config.dtype) if isinstance(config.dtype, str) else config.dtype
    return build_document_mask(position_ids, dtype)


def is_packed_sequence(position_ids: Tensor) -> bool:
    """Return whether a sequence of ``[B, S]`` holds several documents (padding after one counts as
    another)."""
    return bool((position_ids[:, 1:] == 0).any())


def build_document_mask(position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive mask ``[B, 1, S, S]``: 0 where a token sees another, else the minimum.

    A token sees itself and earlier tokens of its document; documents begin where positions are 0.
    """
    return _to_additive_mask(_visible_in_document(position_ids), dtype)


def build_prefix_mask(
    config: Any, position_ids: Tensor, prefix: int, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """Return additive mask(s) ``[B, 1, S, prefix + S]`` of packed sequences with a prefix.

    Every document sees the prefix. In layers with a sliding window, a token sees tokens less than
    the window away; the prefix is right before each document.

    Args:
        config: of the model. One with ``layer_types`` takes a mask for each type, by its name.
        position_ids: ``[B, S]``, 0 where a document begins; the prefix is not counted.
    """
    window = getattr(config, "sliding_window", None)
    masks = {
        "full_attention": _to_additive_mask(_visible_with_prefix(position_ids, prefix, None), dtype)
    }
    if window is not None:
        sees = _visible_with_prefix(position_ids, prefix, window)
        masks["sliding_attention"] = _to_additive_mask(sees, dtype)
    if getattr(config, "layer_types", None) is not None:
        return masks
    return masks["full_attention" if window is None else "sliding_attention"]


def _visible_with_prefix(position_ids: Tensor, prefix: int, window: int | None) -> Tensor:
    """Return ``[B, S, prefix + S]``: which keys a token sees."""
    sees = _visible_in_document(position_ids)
    if window is None:
        ahead = torch.ones_like(sees[:, :, :1]).expand(-1, -1, prefix)
        return torch.cat([ahead, sees], 2)
    before = torch.arange(-prefix, 0, device=position_ids.device)
    distance = position_ids[:, :, None] - position_ids[:, None, :]
    ahead = position_ids[:, :, None] - before < window
    return torch.cat([ahead, sees & (distance < window)], 2)


def _visible_in_document(position_ids: Tensor) -> Tensor:
    """Return ``[B, S, S]``: a token sees itself and the tokens before it in its document."""
    document = (position_ids == 0).cumsum(1)
    same = document[:, :, None] == document[:, None, :]
    return same & torch.ones_like(same).tril()


def _to_additive_mask(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert ``[B, Q, K]`` to ``[B, 1, Q, K]``: 0 where a token sees, else the minimum."""
    mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    return mask.masked_fill(~sees, torch.finfo(dtype).min).unsqueeze(1)


@torch.no_grad()
def documents_are_isolated(
    model: nn.Module, device: torch.device, longest: int = 0, more_lengths: Iterable[int] = ()
) -> bool:
    """Return whether a packed document has the same logits as alone, whatever is before it.

    Tries a sequence of two short documents and, for each length beyond which the model computes
    other rotary angles, sequences with a document of that length before and after a short one. A
    document
    is compared behind two neighbours of one length, which are the same operations: masked tokens
    contribute exactly zero, so in half precision as in float32 any difference is a leak, however
    small (products of experts have other sizes and round differently, which is allowed). And it is
    compared with itself alone, where half precision is allowed its own rounding. Differences are
    relative to the largest logit of the document alone. A leak through a convolution is in the
    first tokens of a document: all are compared. Every rank must call it.

    Args:
        longest: tokens of the longest sequence to come; longer switch lengths are left out.
        more_lengths: treated as those of rotary angles.
    """
    short = 8
    pairs = [(short, short)]
    for switch in sorted({*list_switch_lengths(model.config), *more_lengths}):
        if switch + 1 + short <= longest:
            pairs += [(switch + 1, short), (short, switch + 1)]
    return all(_second_equals_alone(model, device, first, second) for first, second in pairs)


def _second_equals_alone(model: nn.Module, device: torch.device, first: int, second: int) -> bool:
    config: Any = model.config
    count = torch.arange(first + second, device=device)
    ids = (3 + count * 5 % min(89, config.get_text_config().vocab_size - 3)).unsqueeze(0)
    other = ids.clone()
    other[0, :first] = ids[0, :first].flip(0)
    positions = torch.cat([count[:first], count[:second]]).unsqueeze(0)

    def compute_logits(row: Tensor, places: Tensor) -> Tensor:
        found = model(**build_model_inputs(model, row, places), use_cache=False).logits[0, -second:]
        assert isinstance(found, Tensor)
        return found

    alone = compute_logits(ids[:, first:], positions[:, first:])
    scale = float(alone.abs().amax())
    one, two = (compute_logits(row, positions) for row in (ids, other))
    half = alone.dtype != torch.float32
    leak = float((one - two).abs().amax())
    rounded = half and any(isinstance(m, FrozenExperts) for m in model.modules())
    if not leak <= (_HALF if rounded else _LEAK) * scale:
        return False
    error = float((one.float() - alone.float()).abs().amax())
    return error <= (_HALF if half else _FLOAT32) * scale
