"""Affine integers of 2, 3, 4 or 8 bits in groups along a row.

A group of ``group_size`` weights of a row shares a scale and a zero (``Q = 2**bits - 1``)::

    lo    = min(0, min w)        hi = max(0, max w)        the range always holds 0
    scale = fp16((hi - lo) / Q)                            1 for a group of zeros
    zero  = clamp(round(-lo / scale), 0, Q)                an integer, stored in fp16
    q     = clamp(round(w / scale) + zero, 0, Q)
    w'    = (q - zero) * scale                             float32, then the wanted type

This is ``rtn``, rounding to nearest. ``hqq`` keeps the scale, looks for a better, fractional zero
(``quant.hqq``) and takes ``q = clamp(round(w / scale + zero), 0, Q)``. ``gptq`` chooses codes,
scales and integer zeros column by column with calibration data (``quant.gptq``); it is no way to
encode rows alone. ``absmax`` is symmetric, as GGUF's Q8_0 and Q4_0 are::

    scale = fp16(max |w| / (2**(bits - 1) - 1))        zero = 2**(bits - 1)

so that a code less its zero is a signed integer of ``bits``, and ``scale * zero`` is exact in fp16.
All of them decode alike.

Codes are chosen with the *rounded* scale, the one that decoding uses. Rounding is to even. A weight
of 0 decodes to 0. The error is at most ``scale / 2`` inside the range that the codes reach, from
``-zero * scale`` to ``(Q - zero) * scale``; ``lo`` and ``hi`` themselves can lie up to half a step
outside (rounded zero), plus ``Q * scale / 2048`` (rounded scale). All this is for ``rtn``.

Row layout (``groups = ceil(in / group_size)``; the row is zero-padded to whole groups, and the
padding has the code ``zero``)::

    | codes                   | 0 pad | scale fp16 per group | zero fp16 per group |
    ^ groups * group_size * bits / 8 bytes, to a multiple of 4

Codes are a dense LSB-first bit stream (``quant.pack``). ``zero`` is fp16 rather than an integer so
that a row can hold the fractional zeros of QA-LoRA (Xu et al. 2023, section 3.3) or HQQ.

Differences: GPTQ and compressed-tensors keep integer zeros packed in ``bits`` bits; MLX and GGUF
store ``bias = -scale * zero`` instead of ``zero``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from dist_peft.core.config.run import QuantConfig
from dist_peft.quant.codec_defaults import AffineParts, CodecDefaults
from dist_peft.quant.device_choice import RowLayout, dequantize_on_device, quantize_on_device
from dist_peft.quant.hqq import optimize_zero_points
from dist_peft.quant.kept_grid import encode_parts_on_grid
from dist_peft.quant.kernels import dequantize_affine
from dist_peft.quant.pack import pack_bits, unpack_bits
from dist_peft.quant.packed_rows import (
    align_to_4_bytes,
    check_finite_statistics,
    check_packed_rows,
    divide_exactly,
    quantize_in_groups,
    read_packed_field,
    view_as_bytes,
)

__all__ = ["AffineCodec", "AffineParts", "dequantize_affine_parts"]

_SMALLEST_SCALE = 2.0**-24
"""The smallest positive fp16: a finer scale would round to 0."""


@dataclass(frozen=True)
class _AffineLayout:
    groups: int
    stream: int  # bytes of codes
    payload: int  # the same, aligned
    row_bytes: int


@dataclass(frozen=True)
class AffineCodec(CodecDefaults):
    """The affine integer codec. See the module for formula and layout.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: weights that share scale and zero; any multiple of 8.
        solver: how ``encode`` chooses zeros and codes; decoding does not look at it.
    """

    codec_version: ClassVar[int] = 1
    config_keys: ClassVar[tuple[str, ...]] = ("bits", "group_size", "solver")

    bits: int = 4
    group_size: int = 64
    solver: Literal["rtn", "hqq", "absmax"] = "rtn"

    @classmethod
    def from_config(cls, quant: QuantConfig) -> Self:
        """The codec of a ``base.quant`` section with ``kind: int``."""
        # a base to be solved by gptq is first quantized by rounding, while the model is built
        solver = "rtn" if quant.solver == "gptq" else quant.solver
        return cls(quant.bits, quant.group_size, solver)

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"bits is 2, 3, 4 or 8, not {self.bits}")
        if self.group_size < 8 or self.group_size % 8:
            raise ValueError(f"group_size {self.group_size} is not a positive multiple of 8")

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def affine_rows(self) -> Self:
        """The codec itself."""
        return self

    @property
    def grid_rows(self) -> Self:
        """The codec itself."""
        return self

    @property
    def code_bits(self) -> int:
        """``bits``."""
        return self.bits

    def encode_on_grid(self, values: Tensor, kept: Tensor, in_features: int) -> Tensor:
        """Return ``values`` in codes on the scales and zeros of ``kept``."""
        return encode_parts_on_grid(values, kept, self, in_features)

    @property
    def has_integer_zeros(self) -> bool:
        """Whether all zeros are integers: those of ``hqq`` are fractions."""
        return self.solver != "hqq"

    @property
    def is_symmetric(self) -> bool:
        """Whether all zeros are in the middle of the codes."""
        return self.solver == "absmax"

    def describe_storage(self) -> str:
        """Return kind, bits and group size."""
        return f"int, {self.bits} bits in groups of {self.group_size}"

    def read_statistics(self, packed: Tensor, in_features: int) -> Tensor:
        """Return scales, then zeros, ``float16 [rows, 2 groups]``; codes are not unpacked."""
        count = 2 * self._compute_layout(in_features).groups
        return read_packed_field(packed, packed.shape[1] - 2 * count, count, torch.float16)

    def num_row_bytes(self, in_features: int) -> int:
        """Bytes of a packed row; a multiple of 4."""
        return self._compute_layout(in_features).row_bytes

    def quantize_to_packed(self, weight: Tensor) -> Tensor:
        """float ``[rows, in]`` -> ``uint8 [rows, row_bytes]``.

        Raises:
            ValueError: no floating-point matrix, a value is NaN or infinite, or a group's range
                needs a scale beyond fp16.
        """
        if self.solver == "rtn":
            described = self._describe_rows(weight.shape[-1] if weight.dim() else 0)
            fused = quantize_on_device(weight, described, self._quantize_by_torch)
            if fused is not None:
                return fused
        return self._quantize_by_torch(weight)

    def _quantize_by_torch(self, weight: Tensor) -> Tensor:
        def quantize_chunk(groups: Tensor, first_row: int) -> Sequence[Tensor]:
            choose = (
                self._find_symmetric_scale if self.is_symmetric else self.compute_scale_and_zero
            )
            scale, zero = choose(groups, first_row)
            if self.solver == "hqq":
                columns = torch.arange(groups[0].numel(), device=groups.device)
                real = (columns < in_features).view(groups.shape[1:])
                zero = optimize_zero_points(groups, scale, zero, real, self.bits)
            codes = groups / scale.float().unsqueeze(-1)
            if self.solver != "hqq":  # halves to even before an odd zero is added
                codes.round_()
            codes.add_(zero.float().unsqueeze(-1)).round_().clamp_(0, 2**self.bits - 1)
            return self._build_packed_fields(
                AffineParts(codes.to(torch.uint8).flatten(1), scale, zero)
            )

        in_features = weight.shape[-1] if weight.dim() else 0
        row_bytes = self.num_row_bytes(in_features)
        return quantize_in_groups(weight, self.group_size, row_bytes, quantize_chunk)

    def dequantize_rows(self, packed: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
        """``uint8 [rows, row_bytes]`` -> ``dtype [rows, in]``."""
        described = self._describe_rows(in_features)
        check_packed_rows(packed, described.row_bytes, self.name, in_features)

        def by_torch(some: Tensor) -> Tensor:
            stream, scale, zero = self._read_packed_fields(some, in_features)
            return dequantize_affine(stream, self.bits, scale, zero, in_features, dtype)

        fused = dequantize_on_device(packed, described, in_features, dtype, by_torch)
        return by_torch(packed) if fused is None else fused

    def split_packed_rows(self, packed: Tensor, in_features: int) -> AffineParts:
        """Take packed rows apart into codes, scales and zeros."""
        stream, scale, zero = self._read_packed_fields(packed, in_features)
        return AffineParts(unpack_bits(stream, self.bits), scale, zero)

    def join_packed_rows(self, parts: AffineParts, in_features: int) -> Tensor:
        """Inverse of ``split``; the zeros may be fractions, scales and zeros are rounded to fp16.

        Raises:
            ValueError: shapes do not fit ``in_features``, or a code needs more than ``bits`` bits.
        """
        layout = self._compute_layout(in_features)
        rows = parts.codes.shape[0]
        wanted = ((rows, layout.groups * self.group_size), *((rows, layout.groups),) * 2)
        given = tuple(tuple(part.shape) for part in parts)
        if given != wanted:
            raise ValueError(f"codes, scale, zero of {self.name} are {wanted}, not {given}")
        halves = AffineParts(parts.codes, parts.scale.half(), parts.zero.half())
        return torch.cat([view_as_bytes(part) for part in self._build_packed_fields(halves)], 1)

    def _read_packed_fields(
        self, packed: Tensor, in_features: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        layout = self._compute_layout(in_features)
        check_packed_rows(packed, layout.row_bytes, self.name, in_features)
        scale = read_packed_field(packed, layout.payload, layout.groups, torch.float16)
        zero = read_packed_field(
            packed, layout.payload + 2 * layout.groups, layout.groups, torch.float16
        )
        return packed[:, : layout.stream], scale, zero

    def _build_packed_fields(self, parts: AffineParts) -> tuple[Tensor, ...]:
        """The fields of packed rows in the order of the layout."""
        stream = pack_bits(parts.codes, self.bits)
        pad = -stream.shape[1] % 4
        return stream, stream.new_zeros(stream.shape[0], pad), parts.scale, parts.zero

    def compute_scale_and_zero(self, groups: Tensor, first_row: int = 0) -> tuple[Tensor, Tensor]:
        """fp16 scale and integer zero of each group by its ends (see the module).

        Args:
            groups: float32 ``[rows, groups, group_size]``.
            first_row: number of the first row, for messages.

        Returns:
            float16 ``[rows, groups]``, twice.

        Raises:
            ValueError: a value is NaN or infinite, or the range needs a scale beyond fp16.
        """
        top = 2**self.bits - 1
        low, high = groups.amin(dim=-1), groups.amax(dim=-1)
        # inf - inf is NaN, and halves cannot overflow: finite exactly if both ends are
        check_finite_statistics(low / 2 + high / 2, self.group_size, first_row)
        # + 0.0: of -0.0 and 0.0 the minimum is either, by the order in which a device looks at them
        low, high = low.clamp_(max=0).add_(0.0), high.clamp_(min=0)
        exact = divide_exactly(high - low, top).clamp_(min=_SMALLEST_SCALE)
        scale = torch.where(high > low, exact, 1.0).half()
        if bool(torch.isinf(scale).any()):
            raise ValueError(
                f"weights up to {float((high - low).max()):.3g} apart need a scale beyond float16 "
                f"for {self.bits} bits in groups of {self.group_size}"
            )
        # -0.0 where no weight is negative; a lower limit of 0 would make it 0.0 on a GPU alone
        zero = (-low / scale.float()).round_().clamp_(max=top).half()
        return scale, zero

    def _find_symmetric_scale(self, groups: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
        """Of ``absmax``; see ``compute_scale_and_zero``."""
        largest = groups.abs().amax(dim=-1)
        check_finite_statistics(largest, self.group_size, first_row)
        half = 2 ** (self.bits - 1)
        exact = divide_exactly(largest, half - 1).clamp_(min=_SMALLEST_SCALE)
        scale = torch.where(largest > 0, exact, 1.0).half()
        if bool(torch.isinf(scale).any()):
            raise ValueError(
                f"weights up to {float(largest.max()):.3g} need a scale beyond float16 for "
                f"{self.bits} bits"
            )
        return scale, torch.full_like(scale, half)

    def _compute_layout(self, in_features: int) -> _AffineLayout:
        groups = -(-in_features // self.group_size)
        stream = groups * self.group_size * self.bits // 8
        payload = align_to_4_bytes(stream)
        return _AffineLayout(groups, stream, payload, payload + 4 * groups)

    def _describe_rows(self, in_features: int) -> RowLayout:
        layout = self._compute_layout(in_features)
        return RowLayout(
            bits=self.bits,
            group_size=self.group_size,
            groups=layout.groups,
            scales=layout.payload,
            runs=0,
            row_bytes=layout.row_bytes,
            kind="affine",
        )


def dequantize_affine_parts(parts: AffineParts, columns: int) -> Tensor:
    """Dequantize ``(code - zero) * scale`` to float32 ``[rows, columns]``."""
    rows, groups = parts.scale.shape
    codes = parts.codes.view(rows, groups, -1).float()
    numbers = (codes - parts.zero.float().unsqueeze(-1)) * parts.scale.float().unsqueeze(-1)
    return numbers.flatten(1)[:, :columns]
