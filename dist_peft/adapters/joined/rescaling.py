"""One frozen linear with the rescaling vectors of several adapters (IA3), each on its own rows.

y_k = l_k * (W x_k + b)    or    y_k = W (l_k * x_k) + b        one product for all rows
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dist_peft.adapters.joined.layer import JoinedLayer

__all__ = ["JoinedRescaling"]


class JoinedRescaling(JoinedLayer):
    """A linear and the layers that rescale its input or its output."""

    def compute_shares(self, x: Tensor, parts: Sequence[tuple[nn.Module | None, Tensor]]) -> Tensor:
        """Return the output of all rows. See ``JoinedLayer``."""
        layers = [layer for layer, _ in parts]
        if any(layer is not None and layer.rescales_input for layer in layers):
            x = _rescale_parts(layers, [own for _, own in parts], of_input=True)
        y: Tensor = self.base(x)
        return _rescale_parts(layers, y.split([len(own) for _, own in parts]), of_input=False)


def _rescale_parts(
    layers: Sequence[nn.Module | None], parts: Sequence[Tensor], *, of_input: bool
) -> Tensor:
    """Return ``parts`` as one tensor, those rescaled whose layers do so at this end."""
    return torch.cat(
        [
            own if layer is None or layer.rescales_input != of_input else layer(own, is_change=True)
            for layer, own in zip(layers, parts, strict=True)
        ]
    )
