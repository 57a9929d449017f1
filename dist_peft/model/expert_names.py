"""Names of single experts in the files of a model that ``transformers`` loads into stacks.

``transformers`` knows how to write a stack as the published files have it, a tensor for each expert
and projection. It is asked to write one that has the numbers of its rows for values, so that the
result tells which rows each tensor has::

    model.layers.0.mlp.experts.gate_up_proj  [E, 2I, 2]   0, 0, 1, 1, ...
    ->  model.layers.0.mlp.experts.0.gate_proj.weight     rows 0 to I - 1
        model.layers.0.mlp.experts.0.up_proj.weight       rows I to 2I - 1
        ...

Two columns, since older versions squeeze a single one away.
"""

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from dist_peft.core.span import Span

__all__ = ["list_expert_names"]


def list_expert_names(
    model: PreTrainedModel, path: str, experts: int, rows: int
) -> list[tuple[str, Span]] | None:
    """Return the tensors of a stack in the order of its rows; None: ``transformers`` keeps it
    whole, or does not split it into consecutive rows.

    Args:
        path: of the stack's parameter, such as ``model.layers.0.mlp.experts.down_proj``.
        experts: their number.
        rows: of one expert.
    """
    numbers = torch.arange(experts * rows, dtype=torch.float64).view(experts, rows, 1)
    numbers = numbers.repeat(1, 1, 2)
    found: list[tuple[str, Span]] = []
    try:
        tensors = revert_weight_conversion(model, {path: numbers})
    except (AttributeError, RuntimeError, ValueError):
        return None  # a conversion that looks at the parameter itself (Qwen3-VL-MoE)
    for name, value in tensors.items():
        first = int(value.flatten()[0])
        span = Span(first, first + len(value))
        expected = torch.arange(span.start, span.stop).double().view(-1, 1).repeat(1, 2)
        if not torch.equal(value, expected):
            return None
        found.append((name, span))
    found.sort(key=lambda piece: piece[1].start)
    ends = [0, *(span.stop for _, span in found)]
    whole = [span.start for _, span in found] == ends[:-1] and ends[-1] == experts * rows
    return found if whole else None
