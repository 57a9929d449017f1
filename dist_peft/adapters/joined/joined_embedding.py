"""One embedding with the changes of several adapters, each on its own sequences."""

from typing import cast

from torch import Tensor, nn

from dist_peft.adapters.joined.layer import JoinedLayer

__all__ = ["JoinedEmbedding"]


class JoinedEmbedding(JoinedLayer):
    """An input embedding and the layers of the adapters that change it."""

    @property
    def weight(self) -> Tensor:
        """The base's weight, which a tied head uses."""
        return cast(Tensor, self.base.weight)

    def split_rows(self, x: Tensor) -> list[tuple[nn.Module | None, Tensor]]:
        """Return the ids ``[B, S]`` of each adapter. See ``JoinedLayer``."""
        return [(layer, ids.squeeze(-1)) for layer, ids in super().split_rows(x.unsqueeze(-1))]
