"""Affine groups with a float bias, for MLX, the Metal format of transformers and GGUF Q4_1.

::

    w' = q * scale + bias        0 <= q < 2**bits        one scale and bias a group of a row

From an integer base with the adapter in its zeros (``AffineParts``) nothing is quantized: codes and
scales are kept, and ``bias = -scale * zero``. A group may be split into smaller ones that repeat
its scale and bias, and codes may be stored in wider fields; both are exact.

From merged rows a group is rounded to nearest between its minimum and maximum::

    bias = min w        scale = (max w - min w) / (2**bits - 1)        q = round((w - bias) / scale)

with ``bias`` and ``scale`` rounded to the stored type *before* codes are chosen.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dist_peft.quant.codec_defaults import AffineParts
from dist_peft.quant.pack import pack_bits
from dist_peft.quant.packed_rows import divide_exactly

__all__ = ["BiasGroups", "convert_to_bias_groups", "pack_code_words", "quantize_bias_groups"]


class BiasGroups(NamedTuple):
    """Rows in affine groups: ``codes`` uint8 [rows, in], ``scale`` and ``bias`` [rows, groups]."""

    codes: Tensor
    scale: Tensor
    bias: Tensor

    def dequantize(self) -> Tensor:
        """Dequantize to float32 [rows, in]."""
        rows, groups = self.scale.shape
        codes = self.codes.view(rows, groups, -1).float()
        scale, bias = self.scale.float().unsqueeze(-1), self.bias.float().unsqueeze(-1)
        return (codes * scale + bias).flatten(1)


def quantize_bias_groups(
    rows: Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> BiasGroups:
    """Quantize rows ``[n, in]`` in affine groups, rounded to nearest.

    Args:
        rows: rows of floating-point numbers.
        bits: bits of a code.
        group_size: columns that share a scale and bias; divides ``in``.
        dtype: stored type of scale and bias.
    """
    top = 2**bits - 1
    groups = rows.float().reshape(rows.shape[0], -1, group_size)
    low, high = groups.aminmax(dim=-1)
    scale = divide_exactly(high - low, top).to(dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    bias = low.to(dtype)
    codes = (groups - bias.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)
    return BiasGroups(codes.round_().clamp_(0, top).to(torch.uint8).flatten(1), scale, bias)


def convert_to_bias_groups(
    parts: AffineParts, columns: int, group_size: int, dtype: torch.dtype
) -> BiasGroups:
    """Convert codes with float zeros to codes with biases, in groups of ``group_size``.

    Args:
        parts: rows in groups of ``g`` columns; ``group_size`` divides ``g`` and ``columns``.
        columns: in_features; padding columns after it are dropped.
        group_size: columns of a group of the result.
        dtype: stored type of scale and bias; float32 keeps the adapter in the zeros exactly.
    """
    groups = parts.scale.shape[1]
    repeat = parts.codes.shape[1] // groups // group_size
    scale = parts.scale.float()
    bias = -scale * parts.zero.float()
    kept = columns // group_size
    scale, bias = (x.repeat_interleave(repeat, 1)[:, :kept].to(dtype) for x in (scale, bias))
    return BiasGroups(parts.codes[:, :columns], scale, bias)


def pack_code_words(codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Pack uint8 codes ``[rows, n]``, with 32 dividing ``n``, to words ``[rows, n * bits / 32]``.

    ``dtype`` is the 4-byte type of the words.
    """
    packed = pack_bits(codes.contiguous(), bits).reshape(-1)  # a single row may have any stride
    return packed.view(dtype).view(len(codes), codes.shape[1] * bits // 32)
