"""NF4, the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, section 3), in self-contained rows.

A block of ``group_size`` weights of a row shares one scale, its largest magnitude::

    a    = max |w_i|                    "absmax", float32
    c_i  = the code whose level is nearest to w_i / a
    w'_i = LEVELS[c_i] * a              one float32 product, then rounded to the wanted type

The 16 levels are quantiles of the standard normal, scaled to [-1, 1]; 0 is among them.

Row layout (``blocks = ceil(in / group_size)``; the row is zero-padded to whole blocks)::

    single  | payload              | absmax float32 per block                                    |
    double  | payload              | offset, scale float32 per 256 blocks | u8 per block | 0 pad |
            ^ blocks * group_size / 2 bytes, even element in the high nibble

Double quantization stores the scales themselves in 8 bits. With ``s = sqrt(a)``, for each run of up
to 256 blocks *of the row*::

    offset = min s     scale = (max s - min s) / 255     u = round((s - offset) / scale)
    a' = (u * scale + offset)^2

The root spends the 256 steps more evenly in proportion to ``a``: in a row with one outlier block
the plain affine form rounds all ordinary scales coarsely. Rows with few blocks, for which this
saves no byte, keep float32 scales.

Differences to bitsandbytes: its double quantization subtracts the mean over the *tensor* and cuts
256-block runs through row borders, so that a slice encodes differently from the whole; and its
blocks run across rows when ``in % group_size != 0``. Equal to it: payload and absmax, bit for bit,
when ``in % group_size == 0`` (bitsandbytes 0.50 on CPU).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from dist_peft.core.config.run import QuantConfig
from dist_peft.quant.codec_defaults import CodecDefaults
from dist_peft.quant.device_choice import (
    RowLayout,
    dequantize_on_device,
    is_device_path,
    quantize_on_device,
)
from dist_peft.quant.exact_math import exact_sqrt
from dist_peft.quant.kept_grid import encode_nearest_on_grid
from dist_peft.quant.kernels import NF4_LEVELS, dequantize_nf4
from dist_peft.quant.pack import pack_bits
from dist_peft.quant.packed_rows import (
    align_to_4_bytes,
    check_finite_statistics,
    check_packed_rows,
    divide_exactly,
    quantize_in_groups,
    read_packed_field,
)
from dist_peft.quant.table_cache import cache_tables

__all__ = ["NF4_LEVELS", "Nf4Codec"]

RUN_BLOCKS = 256
"""Blocks that share one second-level (offset, scale)."""

_CELLS = 16
"""Cells per unit of the grid that ``_compare_with_border`` starts from; each holds at most one
border."""

_FINE_CELLS = 8192
"""The same of ``_find_nearest_level``'s table of codes, 16 KiB."""

_ON_A_BORDER = 0x80
"""Set in the code of a fine cell that holds a border."""

_ANY_ON_A_BORDER = -0x7F7F7F7F7F7F7F80
"""``_ON_A_BORDER`` in each of the eight bytes of an int64."""


@dataclass(frozen=True)
class _Nf4Layout:
    blocks: int
    payload: int  # bytes of codes
    runs: int  # second-level groups; 0: single level
    row_bytes: int


@dataclass(frozen=True)
class Nf4Codec(CodecDefaults):
    """The NF4 codec. See the module for formula and layout.

    Attributes:
        group_size: weights of a block; any multiple of 8.
        double_quant: store scales in 8 bits where that saves bytes.
    """

    codec_version: ClassVar[int] = 1
    config_keys: ClassVar[tuple[str, ...]] = ("bits", "group_size", "double_quant")

    group_size: int = 64
    double_quant: bool = True

    @classmethod
    def from_config(cls, quant: QuantConfig) -> Self:
        """The codec of a ``base.quant`` section with ``kind: nf4``."""
        return cls(quant.group_size, quant.double_quant)

    def __post_init__(self) -> None:
        if self.group_size < 8 or self.group_size % 8:
            raise ValueError(f"group_size {self.group_size} is not a positive multiple of 8")

    @property
    def name(self) -> str:
        return "nf4"

    @property
    def nf4_rows(self) -> Self:
        """The codec itself."""
        return self

    @property
    def grid_rows(self) -> Self:
        """The codec itself."""
        return self

    @property
    def code_bits(self) -> int:
        """4."""
        return 4

    def encode_on_grid(self, values: Tensor, kept: Tensor, in_features: int) -> Tensor:
        """Return ``values`` in codes on the scales of ``kept``."""
        scale = self.read_statistics(kept, in_features)
        return encode_nearest_on_grid(
            values,
            kept,
            scale,
            scale.shape[1] * self.group_size,
            lambda scaled: _find_nearest_level(scaled.clamp_(-1, 1)),
            bits=4,
            group_size=self.group_size,
            high_first=True,
        )

    def describe_storage(self) -> str:
        """Return kind, bits, group size and double quantization."""
        double = ", double quantization" * self.double_quant
        return f"nf4, 4 bits in groups of {self.group_size}{double}"

    def read_statistics(self, packed: Tensor, in_features: int) -> Tensor:
        """Return the scales that decoding uses, ``float32 [rows, blocks]``."""
        return self.split_packed_rows(packed, in_features)[1]

    def num_row_bytes(self, in_features: int) -> int:
        """Bytes of a packed row; a multiple of 4."""
        return self._compute_layout(in_features).row_bytes

    def quantize_to_packed(self, weight: Tensor) -> Tensor:
        """float ``[rows, in]`` -> ``uint8 [rows, row_bytes]``.

        Raises:
            ValueError: no floating-point matrix, or a value is NaN or infinite.
        """
        layout = self._compute_layout(weight.shape[-1] if weight.dim() else 0)
        fused = quantize_on_device(weight, self._describe_rows(layout), self._quantize_by_torch)
        return self._quantize_by_torch(weight) if fused is None else fused

    def _quantize_by_torch(self, weight: Tensor) -> Tensor:
        layout = self._compute_layout(weight.shape[-1] if weight.dim() else 0)

        def quantize_chunk(groups: Tensor, first_row: int) -> Sequence[Tensor]:
            absmax = _compute_group_absmax(groups, first_row)
            codes = _find_nearest_level(groups * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(-1))
            payload = pack_bits(codes.flatten(1), 4, high_first=True)
            if not layout.runs:
                return payload, absmax
            return payload, *_quantize_absmax(absmax, layout.runs)

        return quantize_in_groups(weight, self.group_size, layout.row_bytes, quantize_chunk)

    def dequantize_rows(self, packed: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
        """``uint8 [rows, row_bytes]`` -> ``dtype [rows, in]``."""
        layout = self._compute_layout(in_features)
        check_packed_rows(packed, layout.row_bytes, self.name, in_features)

        def by_torch(some: Tensor) -> Tensor:
            return dequantize_nf4(*self.split_packed_rows(some, in_features), in_features, dtype)

        if not is_device_path(packed, dtype):
            return by_torch(packed)
        described = self._describe_rows(layout)
        fused = dequantize_on_device(packed, described, in_features, dtype, by_torch)
        return by_torch(packed) if fused is None else fused

    def split_packed_rows(self, packed: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
        """Payload ``uint8 [rows, blocks * group_size / 2]`` (a view) and the scales that decoding
        uses, ``float32 [rows, blocks]``."""
        layout = self._compute_layout(in_features)
        check_packed_rows(packed, layout.row_bytes, self.name, in_features)
        payload, start = packed[:, : layout.payload], layout.payload
        if not layout.runs:
            return payload, read_packed_field(packed, start, layout.blocks, torch.float32)
        statistics = read_packed_field(packed, start, 2 * layout.runs, torch.float32)
        codes = read_packed_field(packed, start + 8 * layout.runs, layout.blocks, torch.uint8)
        return payload, _dequantize_absmax(codes, statistics)

    def compute_absmax(self, weight: Tensor) -> Tensor:
        """First-level scales of a weight before double quantization, ``float32 [rows, blocks]``."""
        blocks = self._compute_layout(weight.shape[-1]).blocks
        as_rows = quantize_in_groups(
            weight,
            self.group_size,
            4 * blocks,
            lambda groups, row: (_compute_group_absmax(groups, row),),
        )
        return read_packed_field(as_rows, 0, blocks, torch.float32)

    def _compute_layout(self, in_features: int) -> _Nf4Layout:
        return _compute_nf4_layout(in_features, self.group_size, self.double_quant)

    def _describe_rows(self, layout: _Nf4Layout) -> RowLayout:
        return RowLayout(
            bits=4,
            group_size=self.group_size,
            groups=layout.blocks,
            scales=layout.payload,
            runs=layout.runs,
            row_bytes=layout.row_bytes,
            kind="nf4",
        )


@functools.cache  # asked twice for every decoded weight
def _compute_nf4_layout(in_features: int, group_size: int, double_quant: bool) -> _Nf4Layout:
    blocks = -(-in_features // group_size)
    payload = blocks * group_size // 2
    runs = -(-blocks // RUN_BLOCKS)
    single, double = 4 * blocks, align_to_4_bytes(8 * runs + blocks)
    if double_quant and double < single:
        return _Nf4Layout(blocks, payload, runs, payload + double)
    return _Nf4Layout(blocks, payload, 0, payload + single)


def _compute_group_absmax(groups: Tensor, first_row: int) -> Tensor:
    """Largest magnitude of each block, ``[rows, blocks]``; ValueError on NaN and infinity."""
    absmax = groups.abs().amax(dim=-1)
    check_finite_statistics(absmax, groups.shape[-1], first_row)
    return absmax


def _find_nearest_level(scaled: Tensor) -> Tensor:
    """Codes of the levels nearest to float32 values in about [-1, 1]: ``uint8``, same shape.

    The code is the number of borders below the value, a value on a border taking the lower code,
    exactly as ``torch.bucketize(scaled, borders)``, but without its binary search, which takes
    twenty times as long. On the CPU a table has the code of each of 16385 cells. Scaling by a power
    of two is exact and cutting off the fraction keeps the order, so all values of a cell without a
    border have one code; the few of the 15 cells with one are found eight at a time and compared.
    """
    if scaled.device.type != "cpu" or scaled.numel() % 8:
        return _compare_with_border(scaled)
    cell = scaled.mul(_FINE_CELLS).int().add_(_FINE_CELLS)
    codes = _build_fine_cells().index_select(0, cell.flatten())
    near = codes.view(torch.int64).bitwise_and(_ANY_ON_A_BORDER).nonzero().squeeze(1)
    if len(near):
        eights = scaled.reshape(-1, 8).index_select(0, near)
        codes.view(-1, 8).index_copy_(0, near, _compare_with_border(eights))
    return codes.view(scaled.shape)


def _compare_with_border(scaled: Tensor) -> Tensor:
    """The same by one comparison for each value: a cell of width 1/16 holds at most one border.

    ``scaled * 16`` is exact, hence the cell is, too.
    """
    first_code, border = _build_level_cells(scaled.device)
    cell = scaled.mul(_CELLS).floor_().clamp_(-_CELLS, _CELLS).int().add_(_CELLS).flatten()
    above = scaled.flatten() > border.index_select(0, cell)
    return torch.add(first_code.index_select(0, cell), above).view(scaled.shape)


@cache_tables
def _build_fine_cells() -> Tensor:
    """The code of each fine cell ``uint8 [16386]``: one more on the right, where ``w * (1 / a)``
    can be the float32 above 1."""
    borders = torch.tensor(list_nf4_borders(), device="cpu")
    numbers = torch.arange(-_FINE_CELLS, _FINE_CELLS + 2, device="cpu")
    codes = torch.bucketize(numbers / _FINE_CELLS, borders).to(torch.uint8)
    codes[borders.mul(_FINE_CELLS).int() + _FINE_CELLS] |= _ON_A_BORDER
    return codes


@cache_tables
def _build_level_cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each cell, the code at its left edge ``uint8 [33]`` and the next border ``[33]``."""
    edges = torch.arange(-_CELLS, _CELLS + 1, device="cpu") / _CELLS
    borders = torch.tensor(list_nf4_borders(), device="cpu")
    first_code = torch.bucketize(edges, borders)
    next_border = torch.cat((borders, borders.new_tensor([torch.inf])))[first_code]
    return first_code.to(device, torch.uint8), next_border.to(device)


def list_nf4_borders() -> list[float]:
    """The 15 float32 midpoints between neighbouring levels, rounded as bitsandbytes rounds them."""
    levels = torch.tensor(NF4_LEVELS, device="cpu")
    return [float(border) for border in (levels[:-1] + levels[1:]) / 2]


def _quantize_absmax(absmax: Tensor, runs: int) -> tuple[Tensor, Tensor]:
    """Scales ``[rows, blocks]`` -> (offset, scale per run) ``[rows, 2 runs]``, codes ``uint8``."""
    rows, blocks = absmax.shape
    root = exact_sqrt(absmax)
    if runs > 1:
        # repeating the last block fills the last run without changing its extremes
        index = torch.arange(runs * RUN_BLOCKS, device=absmax.device).clamp_(max=blocks - 1)
        root = root[:, index]
    root = root.view(rows, runs, root.shape[1] // runs)
    offset = root.amin(dim=-1, keepdim=True)
    scale = divide_exactly(root.amax(dim=-1, keepdim=True) - offset, 255)
    steps = (root - offset) / torch.where(scale > 0, scale, 1.0)
    codes = steps.round_().clamp_(0, 255).to(torch.uint8).flatten(1)[:, :blocks]
    return torch.cat((offset, scale), dim=-1).flatten(1), codes


def _dequantize_absmax(codes: Tensor, statistics: Tensor) -> Tensor:
    """Inverse of ``_quantize_absmax``: ``float32 [rows, blocks]``."""
    # one run, of at most 16384 weights a row, is broadcast: no copies of its two numbers
    is_single = statistics.shape[1] == 2
    offset, scale = (
        column if is_single else column.repeat_interleave(RUN_BLOCKS, dim=1)[:, : codes.shape[1]]
        for column in (statistics[:, 0::2], statistics[:, 1::2])
    )
    # two operations, never one fused multiply-add: the same bits on every device
    return (codes.float() * scale).add_(offset).square_()
