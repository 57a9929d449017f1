"""Rotary angles that depend on a document's length, for packed sequences.

longrope (Ding et al. 2024, "LongRoPE") has one set of frequencies for sequences up to the original
length and another beyond it; dynamic NTK scaling computes new ones for each length beyond it.
``transformers`` takes the largest position of the whole batch for that length, and with dynamic NTK
keeps the frequencies for the next call. So a short document in a batch with a long one, or after
one, would get other angles than alone. Here each document, padding included, has its own
length::

    positions   0 1 2 3 4 5 | 0 1 2 | 0 0        original length 4
    lengths     6 6 6 6 6 6 | 3 3 3 | 1 1
    frequencies long        | short | short
"""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "compute_document_lengths",
    "list_switch_lengths",
    "set_rotary_by_document",
]


def compute_document_lengths(position_ids: Tensor) -> Tensor:
    """Return the length of each token's document, ``[B, S]``: the largest position plus one."""
    document = (position_ids == 0).cumsum(1)
    largest = torch.zeros(len(document), document.shape[1] + 1, dtype=position_ids.dtype)
    largest = largest.to(position_ids.device).scatter_reduce(1, document, position_ids, "amax")
    return largest.gather(1, document) + 1


def list_switch_lengths(config: Any) -> list[int]:
    """Return the sequence lengths beyond which rotary angles change, in order."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    found = set()
    for parameters in nested or [rope]:
        kind = str(parameters.get("rope_type", ""))
        if "dynamic" in kind or kind == "longrope":
            original = parameters.get("original_max_position_embeddings")
            found.add(int(original or text.max_position_embeddings))
    return sorted(found)


def set_rotary_by_document(model: nn.Module) -> None:
    """Make rotary embeddings whose angles depend on a length use each document's length."""
    switches = list_switch_lengths(model.config)
    if not switches:
        return
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        names = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any(str(kind) == "longrope" or "dynamic" in str(kind) for kind in names):
            module.forward = _PerDocumentRotary(module, switches[0])


class _PerDocumentRotary:
    """Forward of a rotary module, called once for each kind of length in the batch."""

    def __init__(self, module: nn.Module, switch: int) -> None:
        self.module, self.switch, self.whole = module, switch, module.forward

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if position_ids.dim() != 2:
            self._reset_dynamic_state()
            return self.whole(x, position_ids, *args, **kwargs)
        lengths = compute_document_lengths(position_ids).clamp_(min=self.switch)
        if (
            getattr(self.module, "rope_type", None) == "longrope"
        ):  # all lengths beyond the switch are alike
            lengths = lengths.clamp_(max=self.switch + 1)
        result: tuple[Tensor, ...] | None = None
        for length in lengths.unique().tolist():
            self._reset_dynamic_state()
            mine = lengths == length
            found = self.whole(x, torch.where(mine, position_ids, 0), *args, **kwargs)
            here = mine.unsqueeze(-1)
            if result is None:
                result = found
            else:
                result = tuple(
                    torch.where(here, new, old) for new, old in zip(found, result, strict=True)
                )
        return result

    def _reset_dynamic_state(self) -> None:
        """Reset the frequencies that earlier calls of dynamic NTK have stored."""
        module: Any = self.module
        kinds = module.rope_type if isinstance(module.rope_type, dict) else {"": module.rope_type}
        for layer_type, kind in kinds.items():
            if "dynamic" in str(kind):
                prefix = f"{layer_type}_" if layer_type else ""
                frequencies = getattr(module, f"{prefix}inv_freq")
                original = getattr(module, f"{prefix}original_inv_freq")
                setattr(module, f"{prefix}inv_freq", original.to(frequencies.device))
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
