"""LoRA of an input embedding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_peft.adapters.lora.layer import LoraSpec
from dist_peft.adapters.low_rank.module import LowRankModule
from dist_peft.core.errors import UserError
from dist_peft.model.adapter_module import JoinedForm
from dist_peft.quant.trainable_products import apply_linear

__all__ = ["LoraEmbedding"]


class LoraEmbedding(LowRankModule):
    """An embedding with LoRA, in PEFT's form: no dropout, ``A`` starts at zero and ``B`` normal.

        y = E[i] + s (B A)[:, i]        A [r, vocab], B [hidden, r]

    An output head tied to the embedding keeps using the unchanged ``E``.

    Args:
        base: the wrapped embedding.
        path: its name in the model.
        spec: settings of the module; DoRA and other initializations do not apply.
        device: where the (unfilled) parameters are made.
    """

    starts_at_zero = "lora_embedding_A"
    spec: LoraSpec
    lora_embedding_A: nn.Parameter
    lora_embedding_B: nn.Parameter

    def __init__(
        self, base: nn.Embedding, path: str, spec: LoraSpec, device: torch.device | str = "meta"
    ) -> None:
        super().__init__(path, spec)
        if spec.dora:
            raise UserError(
                "adapter.use_dora cannot be combined with adapter.embeddings: the norms of an "
                "embedding run over the whole vocabulary; set one of them to false"
            )
        self.base = base
        self._add_meta_parameter(
            "lora_embedding_A", (spec.r, base.num_embeddings), device, train=True
        )
        self._add_meta_parameter(
            "lora_embedding_B", (base.embedding_dim, spec.r), device, train=True
        )

    @property
    def weight(self) -> Tensor:
        """The base's weight, which a tied head uses."""
        return self.base.weight

    @property
    def joined_form(self) -> JoinedForm:
        return "embedding"

    def forward(self, ids: Tensor, *, is_change: bool = False) -> Tensor:
        """``ids`` [...] -> [..., hidden] in the type of the base.

        Args:
            is_change: return ``s B A[:, i]`` alone, in the arithmetic type.
        """
        if is_change:
            return self._compute_change(ids)
        y: Tensor = self.base(ids)
        return (y + self._compute_change(ids)).to(y.dtype) if self.is_enabled else y

    def _compute_change(self, ids: Tensor) -> Tensor:
        dtype = self.spec.arithmetic
        columns = F.embedding(ids, self.lora_embedding_A.T, padding_idx=self.base.padding_idx)
        inner = columns.to(dtype) * self.spec.scaling
        change = apply_linear(inner, self.lora_embedding_B)
        scale = getattr(self.base, "embed_scale", None)  # Gemma scales its embeddings
        if scale is not None:
            change = change * scale
        return change

    def _draw_initial_values(self, name: str) -> Tensor:
        return torch.randn(self.shapes[name], generator=self._make_generator(name))
