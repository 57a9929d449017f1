"""The codec protocol and the list of codecs.

A codec turns the rows of a frozen weight into self-contained packed rows and back::

    float [rows, in]  --encode-->  uint8 [rows, row_bytes]  --decode-->  float [rows, in]

Both directions are row-local, bit for bit: ``encode(w)[a:b]`` equals ``encode(w[a:b])``. So each
rank encodes just the rows that it keeps, and the result does not depend on how many ranks there
are. Codecs are frozen dataclasses: hashable, comparable, picklable.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dist_peft.core.config.run import QuantConfig
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.nf4 import Nf4Codec
from dist_peft.quant.packed_rows import align_to_4_bytes, check_float_weight, check_packed_rows

__all__ = ["Codec", "RawCodec", "make_codec"]


class Codec(Protocol):
    """How frozen rows are packed."""

    @property
    def name(self) -> str:
        """Short name, such as ``nf4``, ``int4``, ``raw``."""

    @property
    def is_quantized(self) -> bool:
        """Whether a row has fewer bits than its numbers; false for raw rows."""

    @property
    def has_zero_points(self) -> bool:
        """Whether each group has a zero that QA-LoRA can merge into."""

    def read_statistics(self, packed: Tensor, in_features: int) -> Tensor:
        """Return all scales and zeros of packed rows, ``float [rows, n]``; n is 0 for raw rows."""

    def num_row_bytes(self, in_features: int) -> int:
        """Bytes of a packed row; a multiple of 4."""

    def quantize_to_packed(self, weight: Tensor) -> Tensor:
        """float ``[rows, in]`` -> ``uint8 [rows, row_bytes]`` on the same device.

        Raises:
            ValueError: no floating-point matrix, or values that the codec cannot represent.
        """

    def dequantize_rows(self, packed: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
        """``uint8 [rows, row_bytes]`` -> ``dtype [rows, in]``; may be a view of ``packed``.

        Raises:
            ValueError: ``packed`` is not the output of ``encode`` for ``in_features``.
        """


@dataclass(frozen=True)
class RawCodec:
    """No quantization: a row is its numbers in ``dtype``, zero-padded to a multiple of 4 bytes.

    Decoding to ``dtype`` is a view without a copy where rows are aligned for it.
    """

    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if not self.dtype.is_floating_point:
            raise ValueError(f"raw rows hold a floating-point type, not {self.dtype}")

    @property
    def name(self) -> str:
        return "raw"

    @property
    def is_quantized(self) -> bool:
        """False: the numbers themselves are stored."""
        return False

    @property
    def has_zero_points(self) -> bool:
        """False."""
        return False

    def read_statistics(self, packed: Tensor, in_features: int) -> Tensor:
        """Return ``float [rows, 0]``: raw rows have no scales."""
        return torch.empty(len(packed), 0)

    def num_row_bytes(self, in_features: int) -> int:
        """Bytes of a packed row; a multiple of 4."""
        return align_to_4_bytes(in_features * self.dtype.itemsize)

    def quantize_to_packed(self, weight: Tensor) -> Tensor:
        """Cast to ``dtype``; NaN and infinity pass when they were there before.

        Rows that need neither cast nor padding are not copied: the result shares their memory.

        Raises:
            ValueError: a finite value of ``weight`` is beyond the range of ``dtype``.
        """
        check_float_weight(weight)
        rows, in_features = weight.shape
        numbers = weight.detach().to(self.dtype).contiguous()
        self._check_dtype_range(weight, numbers)
        if self.num_row_bytes(in_features) == in_features * self.dtype.itemsize:
            return numbers.view(torch.uint8)
        packed = torch.zeros(
            rows, self.num_row_bytes(in_features), dtype=torch.uint8, device=weight.device
        )
        packed[:, : in_features * self.dtype.itemsize] = numbers.view(torch.uint8)
        return packed

    def dequantize_rows(self, packed: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
        """``uint8 [rows, row_bytes]`` -> ``dtype [rows, in]``, a view if nothing must change."""
        check_packed_rows(packed, self.num_row_bytes(in_features), self.name, in_features)
        size = self.dtype.itemsize
        aligned = packed.storage_offset() % size == 0 and packed.stride() == (packed.shape[1], 1)
        if not aligned or packed.shape[1] % size:
            packed = packed[:, : in_features * size].clone(memory_format=torch.contiguous_format)
        return packed.view(self.dtype)[:, :in_features].to(dtype)

    def _check_dtype_range(self, weight: Tensor, numbers: Tensor) -> None:
        narrower = torch.finfo(weight.dtype).max > torch.finfo(self.dtype).max
        if not narrower or not numbers.numel():
            return
        if all(bool(torch.isfinite(end)) for end in numbers.aminmax()):
            return
        overflow = torch.isinf(numbers) & torch.isfinite(weight)
        if bool(overflow.any()):
            row, column = (int(i) for i in overflow.nonzero()[0])
            raise ValueError(
                f"weight {float(weight[row, column]):.6g} in row {row}, column {column} is beyond "
                f"the range of {self.dtype}"
            )


_CODECS: dict[str, Callable[[QuantConfig], Codec]] = {
    "nf4": lambda quant: Nf4Codec(quant.group_size, quant.double_quant),
    # a base to be solved by gptq is first quantized by rounding, while the model is built
    "int": lambda quant: AffineCodec(
        quant.bits, quant.group_size, "hqq" if quant.solver == "hqq" else "rtn"
    ),
}
"""``base.quant.kind`` -> its codec."""


def make_codec(quant: QuantConfig | None, compute_dtype: torch.dtype) -> Codec:
    """The codec of a base: of ``quant``, or raw rows of ``compute_dtype`` without quantization."""
    return RawCodec(compute_dtype) if quant is None else _CODECS[quant.kind](quant)
