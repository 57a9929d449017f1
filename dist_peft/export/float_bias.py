"""``mlx`` and ``hf-metal``: affine groups with float biases, for ``mlx-lm`` and ``transformers``.

Tensors of a linear ``[out, in]``, ``w = code * scale + bias``::

    mlx        weight uint32 [out, in * bits / 32]    scales [out, in / group]    biases [the same]
    hf-metal   weight        the same                 scales        the same      qbiases  the same

The codes are a dense LSB-first bit stream along ``in`` (``quant.pack``). MLX takes 2, 3, 4 and 8
bits in groups of 32, 64 or 128; ``transformers`` 2, 4 and 8 bits in any group size, so that 3-bit
codes are stored in 4 bits there. A linear whose ``in`` is not a multiple of the group size stays
dense: MLX detects it by the absence of ``scales``, ``transformers`` by ``modules_to_not_convert``.

With the adapter in the zeros of an integer base (state ``codes``), scales and biases are float32
and nothing is rounded; merged rows are rounded to nearest (``export.formats.groups``).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.export.formats.groups import BiasGroups, pack_words, quantize_rows, regroup
from dist_peft.export.merged_weights import Walk, Weight
from dist_peft.export.model_directory import Piece, unpacked_linears
from dist_peft.store.writer import TensorSpec

__all__ = ["BiasPacker", "HfMetal", "Mlx", "stored_group"]

MLX_GROUPS = (128, 64, 32)


def stored_group(group_size: int, allowed: tuple[int, ...]) -> int:
    """Return the largest allowed group size that divides ``group_size``, or 0 if there is none."""
    return next((g for g in sorted(allowed, reverse=True) if group_size % g == 0), 0)


class BiasPacker:
    """Pack linears as codes with scales and float biases; base class of ``Mlx`` and ``HfMetal``.

    Args:
        bits: bits of a stored code.
        group_size: columns that share a stored scale and bias.
        dtype: type of stored scales and biases.
    """

    row_multiple = 1
    bias_name: str

    def __init__(self, bits: int, group_size: int, dtype: torch.dtype) -> None:
        self.bits, self.group_size, self.dtype = bits, group_size, dtype

    def takes(self, weight: Weight) -> bool:
        return weight.columns % self.group_size == 0 and weight.columns % 32 == 0

    def plan(self, weight: Weight) -> list[TensorSpec]:
        groups = (weight.rows, weight.columns // self.group_size)
        words = (weight.rows, weight.columns * self.bits // 32)
        return [
            TensorSpec(weight.name, torch.uint32, words),
            TensorSpec(f"{weight.stem}.scales", self.dtype, groups),
            TensorSpec(f"{weight.stem}.{self.bias_name}", self.dtype, groups),
        ]

    def pack(self, walk: Walk, weight: Weight, span: Span) -> Iterable[Piece]:
        groups = self._groups(walk, weight, span)
        yield Piece(weight.name, pack_words(groups.codes, self.bits, torch.uint32), span.start)
        yield Piece(f"{weight.stem}.scales", groups.scale, span.start)
        yield Piece(f"{weight.stem}.{self.bias_name}", groups.bias, span.start)

    def _groups(self, walk: Walk, weight: Weight, span: Span) -> BiasGroups:
        if walk.state == "codes":
            parts = walk.parts(weight, span)
            return regroup(parts, weight.columns, self.group_size, self.dtype)
        rows = walk.rows(weight, span)
        return quantize_rows(rows, self.bits, self.group_size, self.dtype)


class Mlx(BiasPacker):
    """Pack linears for MLX's affine mode, in groups of 32, 64 or 128.

    Raises:
        UserError: no group size of MLX divides ``group_size``.
    """

    bias_name = "biases"

    def __init__(self, bits: int, group_size: int, dtype: torch.dtype) -> None:
        stored = stored_group(group_size, MLX_GROUPS)
        if not stored:
            raise UserError(
                f"mlx supports groups of 32, 64 and 128, not of {group_size}; export this run as "
                "hf-metal, or merge it (hf-bf16)"
            )
        super().__init__(bits, stored, dtype)

    def settings(self, walk: Walk, unpacked: list[str]) -> Mapping[str, Any]:
        how = {"group_size": self.group_size, "bits": self.bits, "mode": "affine"}
        return {"quantization": how}


class HfMetal(BiasPacker):
    """Pack linears for ``transformers``' ``quant_method: metal``; 3-bit codes take 4 bits."""

    bias_name = "qbiases"

    def __init__(self, bits: int, group_size: int, dtype: torch.dtype) -> None:
        super().__init__(4 if bits == 3 else bits, group_size, dtype)

    def settings(self, walk: Walk, unpacked: list[str]) -> Mapping[str, Any]:
        return {
            "quantization_config": {
                "quant_method": "metal",
                "bits": self.bits,
                "group_size": self.group_size,
                "modules_to_not_convert": unpacked_linears(walk, unpacked),
            }
        }
