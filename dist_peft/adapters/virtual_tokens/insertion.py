"""Virtual tokens in front of every document of a batch, and out again.

Each document gets a copy of its own, so that the marks of document boundaries (positions
that restart at 0) hold for the longer rows too, whatever computes the attention::

    positions    0  1  2 | 0  1 |              a row of two documents, two virtual tokens
    wide         0  1  2  3  4 | 0  1  2  3 |
    source       v0 v1 t0 t1 t2| v0 v1 t3 t4|

Rows with fewer documents than others are padded with virtual tokens that are masked out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TokenInsertion"]


@dataclass(frozen=True)
class TokenInsertion:
    """Where everything goes, for rows of ``S`` tokens that become ``W`` wide.

    Attributes:
        place: ``[B, S]``: column of each token in the wide row.
        is_token: ``[B, W]``: false where a virtual token stands.
        source: ``[B, W]``: the column that a token comes from, or the virtual token's number.
        position_ids: ``[B, W]``.
    """

    place: Tensor
    is_token: Tensor
    source: Tensor
    position_ids: Tensor

    @classmethod
    def insert_before_documents(cls, position_ids: Tensor, count: int) -> "TokenInsertion":
        """``count`` virtual tokens before each place where ``position_ids`` ``[B, S]`` are 0."""
        return cls._insert_before(position_ids == 0, position_ids, count)

    @classmethod
    def insert_before_sequences(cls, position_ids: Tensor, count: int) -> "TokenInsertion":
        """``count`` virtual tokens before each row, which may begin with padding."""
        begins = torch.zeros_like(position_ids, dtype=torch.bool)
        begins[:, 0] = True
        return cls._insert_before(begins, position_ids, count)

    @classmethod
    def _insert_before(cls, begins: Tensor, position_ids: Tensor, count: int) -> "TokenInsertion":
        rows, size = position_ids.shape
        document = begins.cumsum(1)
        columns = torch.arange(size, device=begins.device).expand(rows, -1)
        place = columns + count * document
        width = size + count * int(document[:, -1].max())
        is_token = torch.zeros(rows, width, dtype=torch.bool, device=begins.device)
        is_token.scatter_(1, place, True)
        wide = torch.arange(width, device=begins.device).expand(rows, -1)
        last_token = wide.masked_fill(~is_token, -1).cummax(1).values
        number = wide - last_token - 1  # of a virtual token in its run
        source = number.scatter(1, place, columns)
        positions = number.scatter(1, place, position_ids + count)
        return cls(place, is_token, source, positions)

    def insert_embeddings(self, embeddings: Tensor, virtual: Tensor) -> Tensor:
        """``[B, S, H]`` and virtual tokens ``[count, H]`` -> ``[B, W, H]``."""
        size, count = embeddings.shape[1], virtual.shape[0]
        tokens = embeddings.gather(1, _expand_index(self.source.clamp(max=size - 1), embeddings))
        inserted = virtual[self.source.clamp(max=count - 1)]
        return torch.where(self.is_token[..., None], tokens, inserted)

    def remove_inserted_states(self, states: Tensor) -> Tensor:
        """``[B, W, H]`` -> those of the tokens ``[B, S, H]``."""
        return states.gather(1, _expand_index(self.place, states))

    def widen_attention_mask(self, mask: Tensor) -> Tensor:
        """``[B, S]``, 0 for padding -> ``[B, W]``, 1 for virtual tokens."""
        return torch.ones_like(self.source, dtype=mask.dtype).scatter(1, self.place, mask)


def _expand_index(columns: Tensor, like: Tensor) -> Tensor:
    return columns[..., None].expand(-1, -1, like.shape[-1])
