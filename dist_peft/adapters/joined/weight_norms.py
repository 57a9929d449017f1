"""One frozen linear with the DoRA changes of several adapters, each on its own rows.

DoRA (Liu et al. 2024) reads the base's product of its rows, and that of its ``A`` for the norms of
``W + s B A``. All of them are rows of two products, for each of which ``W`` is decoded once::

    [ x ; drop_0(x_0) ; ... ; drop_{K-1}(x_{K-1}) ] W^T     outputs, and products after dropout
    [ A_0 ; ... ; A_{K-1} ] W^T                             without gradient
    y_k += (m_k/n_k - 1) W drop_k(x_k) + m_k/n_k s_k B_k A_k drop_k(x_k)

Without dropout the products are the outputs, without the bias.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dist_peft.adapters.joined.layer import JoinedLayer, add_changes
from dist_peft.adapters.low_rank.module import LowRankModule
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.quant.frozen_matmul import frozen_matmul

__all__ = ["JoinedWeightNorms"]


class JoinedWeightNorms(JoinedLayer):
    """A linear and the DoRA layers of the adapters that target it."""

    def compute_shares(self, x: Tensor, parts: Sequence[tuple[nn.Module | None, Tensor]]) -> Tensor:
        """Return the output of all rows. See ``JoinedLayer``."""
        dropped = [
            own if layer is None else cast(nn.Module, layer.dropout)(own) for layer, own in parts
        ]
        products, images = list[Tensor](), list[Tensor]()

        def multiply(x: Tensor) -> Tensor:
            images.extend(self._multiply_directions(parts))
            y, own = self._multiply_rows(x, parts, dropped)
            products.extend(own)
            return y

        # called by the base, whose hooks may gather its rows
        y: Tensor = self.base(x, multiply=multiply)
        remaining = iter(images)
        changes = [
            None if layer is None else layer(own, products=(product, next(remaining)))
            for (layer, _), own, product in zip(parts, dropped, products, strict=True)
        ]
        return add_changes(y, changes, [len(own) for _, own in parts])

    def _multiply_rows(
        self,
        x: Tensor,
        parts: Sequence[tuple[nn.Module | None, Tensor]],
        dropped: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the products of ``x`` and of the rows of each part after dropout."""
        changed = [
            after for (_, own), after in zip(parts, dropped, strict=True) if after is not own
        ]
        counts = [len(x), *(len(own) for own in changed)]
        y, *others = self._multiply(torch.cat([x, *changed]) if changed else x).split(counts)
        plain = y.split([len(own) for _, own in parts])
        after_dropout = iter(others)
        return y, [
            next(after_dropout) if after is not own else product
            for (_, own), after, product in zip(parts, dropped, plain, strict=True)
        ]

    @torch.no_grad()
    def _multiply_directions(
        self, parts: Sequence[tuple[nn.Module | None, Tensor]]
    ) -> Sequence[Tensor]:
        """Return ``(W A^T)^T`` [r, out] of each layer among ``parts``."""
        layers = [(layer, own) for layer, own in parts if layer is not None]
        if not layers:
            return []
        dtype = cast(LowRankModule, layers[0][0]).spec.arithmetic  # all adapters have one
        directions = [layer(own, gives_directions=True).to(dtype) for layer, own in layers]
        return self._multiply(torch.cat(directions)).split([len(own) for own in directions])

    def _multiply(self, x: Tensor) -> Tensor:
        base = cast(FrozenLinear, self.base)
        return frozen_matmul(x, base.packed, base.codec, base.in_features)
