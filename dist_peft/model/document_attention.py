"""Attention of packed sequences, one causal product for each document instead of a mask.

A packed sequence of ``S`` tokens holds documents of lengths ``n_1, n_2, ...``. With a mask the
product has ``S x S`` scores, of which ``sum n_i^2 / 2`` count, and the mask itself takes ``S x S``
bytes: 1 GiB at 32 768 tokens. Here scores outside a document are never computed::

    S x S with a mask        a product for each document
    1 . . . . .              1 .
    1 1 . . . .              1 1
    . . 1 . . .                  1 . .
    . . 1 1 . .                  1 1 .
    . . 1 1 1 .                  1 1 1
    . . . . . 1                        1

``transformers`` passes a four-dimensional ``attention_mask`` through to the attention function
unchanged. Where documents begin is passed in its place, as an int32 tensor ``[1, 1, 1, D + 1]`` of
boundaries in the flattened batch ``[B * S]`` (the cumulative lengths of variable-length kernels),
to a function that is registered under ``DOCUMENT_ATTENTION``. On CUDA 16-bit
products are one call of ``torch.nn.attention.varlen``. Any other mask goes to ``transformers``'
own ``sdpa`` function.

Layers with a sliding window get a mask as before where a document is longer than the window; where
none is, the window has no effect.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dist_peft.quant.cpu_products import has_fast_product
from dist_peft.quant.kept_results import keep_attention_results

__all__ = [
    "DOCUMENT_ATTENTION",
    "build_document_boundaries",
    "build_document_masks",
    "document_attention_forward",
    "select_document_attention",
]

DOCUMENT_ATTENTION = "document_sdpa"
"""Name of the attention function in ``transformers``' registry."""


_LAYER_TYPES = {"full_attention", "sliding_attention"}
_OTHER_OPTIONS = ("dropout", "softcap")
_OTHER_TENSORS = ("position_bias", "s_aux")
"""Arguments of attention functions that change the scores, which one plain product leaves out."""


def build_document_boundaries(position_ids: Tensor, is_packed: bool = True) -> Tensor:
    """Return where documents begin in the flattened batch, and its end: int32 ``[1, 1, 1, D + 1]``.

    Args:
        position_ids: ``[B, S]`` on the CPU, 0 where a document (or the padding) begins.
        is_packed: false: each sequence is one document and its padding, which comes last and which
            no token of the document sees; boundaries are those of the sequences.
    """
    batch, length = position_ids.shape
    begins = position_ids == 0 if is_packed else torch.zeros_like(position_ids, dtype=torch.bool)
    begins[:, 0] = True
    ends = torch.tensor([batch * length])
    boundaries = torch.cat([begins.flatten().nonzero().squeeze(1), ends])
    return boundaries.to(torch.int32).view(1, 1, 1, -1)


@keep_attention_results()
def document_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within documents; an attention function of ``transformers``.

    Args:
        query: ``[B, heads, S, D]``; ``key`` and ``value``: ``[B, key heads, S, D]``.
        attention_mask: boundaries as returned by ``build_document_boundaries``, or any mask that
            ``sdpa`` takes.
        scaling: of the scores; default: ``1 / sqrt(D)``.

    Returns:
        ``[B, S, heads, D]`` and no weights.
    """
    dtype = query.dtype
    if not has_fast_product(query.device, dtype):
        query, key, value = query.float(), key.float(), value.float()
    if attention_mask is None or attention_mask.dtype != torch.int32:
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.to(query.dtype)
        attended, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return attended.to(dtype), None
    asked = [name for name in _OTHER_OPTIONS if kwargs.get(name)] + [
        name for name in _OTHER_TENSORS if kwargs.get(name) is not None
    ]
    if asked or kwargs.get("is_causal") is False:
        # found on fake tensors when the model is built, which then keeps transformers' masks
        raise ValueError(f"attention within documents is causal and takes no {asked}")
    boundaries = attention_mask.flatten()
    if query.is_cuda and query.dtype.itemsize == 2 and query.shape[-1] == value.shape[-1] <= 256:
        return _attend_varlen(query, key, value, boundaries, scaling), None
    batch, heads, length, _ = query.shape
    pieces = [(slice(None), slice(None))]  # one document a sequence: all at once
    if len(boundaries) != batch + 1:
        pieces = []
        for first, end in pairwise(boundaries.tolist()):
            row, begin = divmod(first, length)
            pieces.append((slice(row, row + 1), slice(begin, begin + end - first)))
    parts = [
        nn.functional.scaled_dot_product_attention(
            query[rows, :, span],
            key[rows, :, span],
            value[rows, :, span],
            is_causal=True,
            scale=scaling,
            enable_gqa=key.shape[1] != heads,
        ).transpose(1, 2)
        for rows, span in pieces
    ]
    joined = parts[0] if len(parts) == 1 else torch.cat([p.flatten(0, 1) for p in parts])
    return joined.reshape(batch, length, heads, value.shape[-1]).to(dtype).contiguous(), None


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, scaling: float | None
) -> Tensor:
    """Return ``[B, S, heads, D]``, computed by one call of a variable-length kernel."""
    from torch.nn.attention.varlen import varlen_attn  # CUDA only; heavy to import

    batch, heads, length, _ = query.shape
    options = _list_varlen_options(varlen_attn)
    if key.shape[1] != heads and "enable_gqa" not in options:
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    causal: dict[str, Any] = {"is_causal": True}
    if "window_size" in options:  # from torch 2.11 on
        causal = {"window_size": (-1, 0)}
    if key.shape[1] != heads:
        causal["enable_gqa"] = True
    flat_query, flat_key, flat_value = (
        x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)
    )
    # the longest document is known on the device only; the kernel's grid takes an upper bound
    result = varlen_attn(
        flat_query,
        flat_key,
        flat_value,
        boundaries,
        boundaries,
        length,
        length,
        scale=scaling,
        **causal,
    )
    assert isinstance(result, Tensor)
    return result.view(batch, length, heads, -1)


@functools.cache
def _list_varlen_options(kernel: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(kernel).parameters)


def build_document_masks(
    model: nn.Module, position_ids: Tensor, is_packed: bool
) -> Tensor | dict[str, Tensor] | None:
    """Return the ``attention_mask`` argument of a model with document attention.

    Args:
        model: one that ``select_document_attention`` was true for.
        position_ids: ``[B, S]``, 0 where a document begins, on the CPU.
        is_packed: as of ``build_document_boundaries``.

    Returns:
        Boundaries, or, for a model whose layers are of several types, boundaries or a mask for each
        type; None where ``transformers`` must build the mask (windows shorter than a document in a
        model with one type of layers).
    """
    whole: Any = model.config
    config = whole.get_text_config()
    boundaries = build_document_boundaries(position_ids, is_packed)
    window = getattr(config, "sliding_window", None)
    longest = int(position_ids.max()) + 1
    if not window or longest <= window:
        window = None
    types = set(getattr(config, "layer_types", None) or ())
    if not types or not _takes_mask_by_type(_find_model_module(model)):
        return boundaries if window is None else None
    masks = dict.fromkeys(sorted(_LAYER_TYPES), boundaries)  # code may read both
    if window is not None and "sliding_attention" in types:
        masks["sliding_attention"] = _build_window_mask(position_ids, window)
    return masks


def _build_window_mask(position_ids: Tensor, window: int) -> Tensor:
    """Return bool ``[B, 1, S, S]``: true for tokens of a document, less than ``window`` before."""
    document = (position_ids == 0).cumsum(1)
    order = torch.arange(position_ids.shape[1])
    distance = order[:, None] - order[None, :]
    same = document[:, :, None] == document[:, None, :]
    return (same & (distance >= 0) & (distance < window)).unsqueeze(1)


def select_document_attention(model: nn.Module) -> bool:
    """Make a language model use document attention where it can; return whether it does.

    It can where its attention is ``sdpa`` and causal, every attention goes through
    ``transformers``' registry, and its layers are of types whose masks are known.
    """
    config: Any = model.config
    text = config.get_text_config()
    types = set(getattr(text, "layer_types", None) or ())
    source = _read_model_source(_find_model_module(model))
    if (
        config._attn_implementation != "sdpa"
        or not getattr(model, "_supports_attention_backend", False)
        or not types <= _LAYER_TYPES
        or any(getattr(module, "is_causal", True) is False for module in model.modules())
        or (len(types) > 1 and not _takes_mask_by_type(_find_model_module(model)))
        or "ALL_ATTENTION_FUNCTIONS" not in source
        or "_attn_implementation ==" in source  # other code for sdpa
        or "cross_attn" in source  # attention to something else than the sequence
    ):
        return False
    AttentionInterface.register(DOCUMENT_ATTENTION, document_attention_forward)
    AttentionMaskInterface.register(DOCUMENT_ATTENTION, sdpa_mask)
    config._attn_implementation = text._attn_implementation = DOCUMENT_ATTENTION
    return True


@functools.cache  # asked for every micro-batch
def _takes_mask_by_type(module: str) -> bool:
    return "attention_mask, dict)" in _read_model_source(module)


def _find_model_module(model: nn.Module) -> str:
    """Return the name of the module with the model's code.

    FSDP2 gives a sharded model a class of its own, made in a module of PyTorch.
    """
    names = (kind.__module__ for kind in type(model).__mro__)
    return next((name for name in names if not name.startswith("torch.")), type(model).__module__)


def _read_model_source(module: str) -> str:
    file = sys.modules[module].__file__
    return "" if file is None else Path(file).read_text(encoding="utf-8")
