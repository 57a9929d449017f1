"""Packed rows: how a model is told that the documents of a row must not see each other.

A row holds several documents; their position ids restart at 0. From that ``transformers`` builds a
block-diagonal causal mask (or cumulative lengths for variable-length flash attention), combined
with sliding windows where a layer has one. A few families do not look at the positions there; they
get the mask explicitly. ``documents_are_isolated`` does not trust either: it looks at the logits.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dist_peft.model.skeleton import torch_dtype

__all__ = ["document_mask", "documents_are_isolated", "model_inputs"]

_NEED_EXPLICIT_MASK = {"opt"}
"""Model types that build their causal mask without looking at the position ids."""


def model_inputs(model: nn.Module, input_ids: Tensor, position_ids: Tensor) -> dict[str, Any]:
    """Keyword arguments of the forward pass for packed rows ``[B, S]``."""
    inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids}
    config: Any = model.config
    packed = bool((position_ids[:, 1:] == 0).any())
    if config.model_type in _NEED_EXPLICIT_MASK and packed:
        # a name after save_pretrained has made the configuration JSON
        dtype = torch_dtype(config.dtype) if isinstance(config.dtype, str) else config.dtype
        inputs["attention_mask"] = document_mask(position_ids, dtype)
    return inputs


def document_mask(position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask ``[B, 1, S, S]``: 0 where a token sees another, else the least number.

    A token sees itself and earlier tokens of its document; documents begin where positions are 0.
    """
    document = (position_ids == 0).cumsum(1)
    same = document[:, :, None] == document[:, None, :]
    sees = same & torch.ones_like(same).tril()
    mask = torch.zeros(sees.shape, dtype=dtype, device=position_ids.device)
    return mask.masked_fill(~sees, torch.finfo(dtype).min).unsqueeze(1)


@torch.no_grad()
def documents_are_isolated(model: nn.Module, device: torch.device) -> bool:
    """Whether changing a packed document leaves the logits of the next one as they are.

    Two forward passes over 8 tokens; every rank must call it.
    """
    ids = torch.arange(3, 11, device=device).unsqueeze(0)
    positions = (torch.arange(8, device=device) % 4).unsqueeze(0)
    other = ids.clone()
    other[0, :4] = ids[0, :4].flip(0)
    logits = [
        model(**model_inputs(model, row, positions), use_cache=False).logits[0, 4:].float()
        for row in (ids, other)
    ]
    return bool(torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-3))
