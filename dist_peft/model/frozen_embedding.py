"""An input embedding that is kept packed and dequantizes only the rows that are looked up.

    ids [B, S]  ->  packed[ids]  uint8 [B S, row_bytes]  ->  decode  [B S, hidden]

A row of a codec is self-contained, so a row of the table can be read without the others: what is
dense is as large as the layer's output, never the table. The output equals, bit for bit, a plain
embedding of the table ``decode(packed)``.

Families that do more than look up (Gemma scales its embeddings) keep their own code: it is run on
the decoded rows as the table, with each position's row as its id.

bitsandbytes' ``Embedding4bit`` does the same for tables whose columns its blocks divide; here
a last group that is not full is padded, and scales are inside of the rows, so that engines shard
them.

A tied output head (``FrozenLinear``) holds the same parameter: one packed copy for both.
"""

import copy

import torch
from torch import Tensor, nn

from dist_peft.model.frozen_linear import FrozenWeight
from dist_peft.quant.codec import Codec

__all__ = ["FrozenEmbedding"]


class FrozenEmbedding(FrozenWeight):
    """A frozen embedding of packed rows.

    Args:
        embedding: the module that it replaces, unchanged; its weight may be on ``meta``.
        codec, source, device: as in ``FrozenWeight``.

    Attributes:
        packed: ``uint8 [num_embeddings, row_bytes]``.
        dtype: of the output: that of ``embedding``'s weight.
        own_code: a copy of ``embedding`` without its weight, where its class has a forward of its
            own; else None.

    Raises:
        ValueError: ``embedding`` changes its weight in its forward (``max_norm``).
    """

    own_code: nn.Embedding | None

    def __init__(
        self,
        embedding: nn.Embedding,
        codec: Codec,
        source: str = "",
        device: torch.device | str = "meta",
    ) -> None:
        if embedding.max_norm is not None:
            raise ValueError("an embedding with max_norm changes its weight")
        super().__init__(embedding.embedding_dim, embedding.num_embeddings, codec, source, device)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.dtype = embedding.weight.dtype
        self.own_code = None
        if type(embedding).forward is not nn.Embedding.forward:
            self.own_code = copy.copy(embedding)
            own = vars(self.own_code)
            own["_parameters"], own["_buffers"] = {}, dict(embedding._buffers)
            own["padding_idx"] = None  # only keeps a gradient away, and there is none

    @property
    def embed_scale(self) -> Tensor | float | None:
        """The factor of the rows, in families whose embeddings have one."""
        scale: Tensor | float | None = getattr(self.own_code, "embed_scale", None)
        return scale

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ``ids`` [...], any integer type of indices -> [..., embedding_dim] in ``dtype``.

        Raises:
            IndexError: on a CPU: an id is outside of the table.
        """
        packed = self.packed.index_select(0, ids.flatten())
        return self.finish_lookup(
            ids, self.codec.dequantize_rows(packed, self.embedding_dim, self.dtype)
        )

    def finish_lookup(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Compute the output from decoded rows, ``[ids.numel(), embedding_dim]`` in order."""
        if self.own_code is None:
            return rows.view(*ids.shape, self.embedding_dim)
        own = vars(self.own_code)
        own["weight"] = rows
        try:
            found: Tensor = self.own_code(
                torch.arange(len(rows), device=ids.device).view(ids.shape)
            )
        finally:
            del own["weight"]
        return found

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, codec={self.codec.name}"
