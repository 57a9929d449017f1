"""One frozen linear with the changes of several adapters, each on its own rows.

    rows of x     | adapter 0 | adapter 1 | ... | adapter K-1 |
    y = x W^T + b                                one product for all rows: W is gathered and
                                                 dequantized once
    change_k = s_k B_k A_k drop_k(x_k)           a small product for each adapter's rows
    y_k += change_k

The base's product is where time, gathered bytes and dequantization go, and its gradient ``dy W``
is shared as well. Small products of the parts stay apart, so that adapters may have different ranks
and scalings, and a value that is not finite stays in its own adapter's rows and gradients.

Layers are called for their part (``is_change``), so that an engine's hooks on them see it.

mLoRA (Ye et al. 2023) batches adapters in this way on one device; here the base is sharded.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dist_peft.adapters.joined.row_shares import RowShares
from dist_peft.adapters.low_rank.module import LowRankModule
from dist_peft.core.span import Span
from dist_peft.model.adapter_module import InitializesFromBase, Reduce

__all__ = ["JoinedLayer", "add_changes"]


class JoinedLayer(nn.Module):
    """A linear and the layers of the adapters that target it.

    Args:
        base: the linear.
        path: its name in the model.
        layers: by number of the adapter; each wraps ``base``. They keep it as an attribute from
            now on, so that it is found in the model once.
        shares: which rows belong to which adapter.

    Attributes:
        points: the layers by number, as text.
    """

    def __init__(
        self, base: nn.Module, path: str, layers: Mapping[int, nn.Module], shares: RowShares
    ) -> None:
        super().__init__()
        self.base, self.path, self.shares = base, path, shares
        for layer in layers.values():
            layer._modules.pop("base")
            vars(layer)["base"] = base
        self.points = nn.ModuleDict({str(number): layer for number, layer in layers.items()})

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out] in the type of the base's output."""
        only = self.shares.only
        if only is not None:
            alone = str(only)
            y: Tensor = self.points[alone](x) if alone in self.points else self.base(x)
            return y
        return self.compute_shares(x, self.split_rows(x))

    def split_rows(self, x: Tensor) -> list[tuple[nn.Module | None, Tensor]]:
        """Return the rows of each adapter, and its layer or None where it does not target this
        linear."""
        parts = self.shares.list_parts(x, self.path)
        rows, layers = x.split([count for _, count in parts]), dict(self.points.items())
        return [
            (layers.get(str(number)), own) for (number, _), own in zip(parts, rows, strict=True)
        ]

    def compute_shares(self, x: Tensor, parts: Sequence[tuple[nn.Module | None, Tensor]]) -> Tensor:
        """Return the output of all rows.

        Args:
            parts: of ``x``, in its order.
        """
        # changes come first, as in the layer of one adapter: recomputation stops at the last tensor
        # that backward needs, and the frozen product keeps none
        changes = [None if layer is None else layer(own, is_change=True) for layer, own in parts]
        y: Tensor = self.base(x)
        return add_changes(y, changes, [len(own) for _, own in parts])

    # -- initialization ------------------------------------------------------------------------

    @property
    def needs_base_rows(self) -> bool:
        """Whether the start depends on the weight (PiSSA, LoftQ). See ``InitializesFromBase``."""
        return any(getattr(layer, "needs_base_rows", False) for layer in self.points.values())

    def prepare_base_rows(self, rows: Tensor, span: Span, reduce: Reduce) -> Tensor:
        """Let one layer compute the start, which is that of all: configurations with different ones
        are refused, since the rows to quantize are what the start leaves."""
        first, *others = (cast(LowRankModule, layer) for layer in self.points.values())
        encoded = cast(InitializesFromBase, first).prepare_base_rows(rows, span, reduce)
        for other in others:
            other.copy_starts(first)
        return encoded

    def init_rows(self, name: str, span: Span) -> Tensor:
        raise AssertionError("parameters are those of the layers")


def add_changes(y: Tensor, changes: Sequence[Tensor | None], counts: Sequence[int]) -> Tensor:
    """Return ``y`` with each change added to its rows, in the type of ``y``.

    Args:
        changes: by part, ``[rows, ...]`` like ``y``; None: nothing is added.
        counts: rows of each part.
    """
    if all(change is None for change in changes):
        return y
    filled = [
        y.new_zeros(count, *y.shape[1:]) if change is None else change
        for change, count in zip(changes, counts, strict=True)
    ]
    return (y + torch.cat(filled)).to(y.dtype)
