"""Experts stored in MXFP4, as gpt-oss is published (numbers: ``quant.mxfp4``).

For a stack of experts, whose parameter ``NAME`` is ``[E, in, out]`` in an unquantized base::

    NAME_blocks  uint8 [E, out, in / 32, 16]    two codes a byte, the even one in the low nibble
    NAME_scales  uint8 [E, out, in / 32]        exponents, 127 added

A row of a product has its codes and exponents next to each other, which are the bytes of our rows:
a rank reads those of its rows and nothing else. Attention, router, biases and embeddings are in
bfloat16.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.prequantized.linear import (
    UNQUANTIZED_HINT,
    PackedFormat,
    PackedLinear,
    Settings,
    count_whole_groups,
    require_tensor,
)
from dist_peft.quant.mxfp4 import MXFP4_GROUP, Mxfp4Codec
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader

__all__ = ["Mxfp4Format"]


@dataclass(frozen=True)
class _Mxfp4Stack(PackedLinear):
    @property
    def weight_name(self) -> str:
        return self.stem

    def _read_packed(self, reader: RowReader, span: Span) -> Tensor:
        groups = self.in_features // MXFP4_GROUP
        blocks = reader.read_flat_rows(
            f"{self.stem}_blocks", Span(span.start * groups, span.stop * groups)
        )
        scales = reader.read_flat_rows(f"{self.stem}_scales", span)
        pad = scales.new_zeros(len(span), -groups % 4)
        return torch.cat((blocks.view(len(span), -1), scales, pad), 1)


@dataclass(frozen=True)
class Mxfp4Format(PackedFormat):
    """MXFP4 of gpt-oss."""

    MARK: ClassVar[str] = "_blocks"
    OTHERS: ClassVar[tuple[str, ...]] = ("_scales",)
    WEIGHT: ClassVar[str] = ""

    @classmethod
    def from_settings(cls, settings: Settings, index: SafetensorsIndex) -> Self:
        return cls("mxfp4", QuantConfig(kind="mxfp4"))

    def open_linear(
        self, index: SafetensorsIndex, stem: str, out_features: int, in_features: int
    ) -> PackedLinear:
        groups = count_whole_groups(stem, in_features, MXFP4_GROUP)
        found = index.find_tensor(f"{stem}{self.MARK}").shape
        experts = found[0] if len(found) == 4 else 0
        if not experts or out_features % experts:
            raise UserError(
                f"tensor {stem}{self.MARK} in {index.path} has shape {list(found)}, not [experts, "
                f"rows, {groups}, {MXFP4_GROUP // 2}] with {out_features} rows in all: a variant "
                f"that is not read; {UNQUANTIZED_HINT}"
            )
        shape = (experts, out_features // experts, groups)
        require_tensor(index, f"{stem}_blocks", (*shape, MXFP4_GROUP // 2), (torch.uint8,))
        require_tensor(index, f"{stem}_scales", shape, (torch.uint8,))
        return _Mxfp4Stack(stem, out_features, in_features, Mxfp4Codec())
