"""Views of packed rows as codes, scales and zeros, and defaults of a codec without such views.

Exports keep the codes of a base where their format has the same layout. They ask the codec for a
view of its rows instead of its class: a new codec with rows of scaled integers returns one from
``affine_rows`` and can be written by every format for these.
"""

from typing import Any, NamedTuple, Protocol

from torch import Tensor

__all__ = [
    "AffineParts",
    "AffineRows",
    "CodecDefaults",
    "Fp8Rows",
    "GridRows",
    "Int8Rows",
    "Mxfp4Rows",
    "Nf4Rows",
    "Nvfp4Rows",
    "OrderedRows",
]


class AffineParts(NamedTuple):
    """A packed weight taken apart: ``w = (code - zero) * scale``.

    Attributes:
        codes: ``uint8 [rows, groups * group_size]``, padding of the row included.
        scale: ``float16 [rows, groups]``.
        zero: ``float16 [rows, groups]``.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


class AffineRows(Protocol):
    """Rows of unsigned integer codes in groups with a scale and a zero."""

    @property
    def bits(self) -> int:
        """Bits of a code."""

    @property
    def group_size(self) -> int:
        """Columns that share a scale and a zero."""

    @property
    def has_integer_zeros(self) -> bool:
        """Whether all zeros are integers in the range of the codes."""

    def split_packed_rows(self, packed: Tensor, in_features: int) -> AffineParts:
        """Return codes, scales and zeros of ``uint8 [rows, row_bytes]``."""

    def join_packed_rows(self, parts: AffineParts, in_features: int) -> Tensor:
        """Return packed rows of codes, scales and zeros, which are rounded to float16."""


class Nf4Rows(Protocol):
    """Rows of NF4 codes (levels: ``quant.nf4.NF4_LEVELS``) in groups with a scale."""

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""

    @property
    def double_quant(self) -> bool:
        """Whether scales are quantized too."""

    def split_packed_rows(self, packed: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
        """Return two codes a byte, the even column high, ``uint8 [rows, groups * group_size / 2]``,
        and scales ``float32 [rows, groups]`` of ``uint8 [rows, row_bytes]``."""


class Fp8Rows(Protocol):
    """Rows of FP8 codes (E4M3) in groups with a scale."""

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""

    def count_groups(self, in_features: int) -> int:
        """Return the number of scales of a row."""

    def split_packed_rows(self, packed: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
        """Return codes ``float8_e4m3fn [rows, in]`` and scales ``float32 [rows, groups]`` of
        ``uint8 [rows, row_bytes]``."""


class Mxfp4Rows(Protocol):
    """Rows of MXFP4: codes (E2M1) in groups of 32 with an exponent (E8M0)."""

    def split_packed_rows(self, packed: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
        """Return two codes a byte, the even column low, ``uint8 [rows, groups * 16]``, and
        exponents ``uint8 [rows, groups]`` of ``uint8 [rows, row_bytes]``."""


class Nvfp4Rows(Protocol):
    """Rows of NVFP4: codes (E2M1) in groups of 16 with an E4M3 scale, and a divisor of scales."""

    def split_packed_rows(self, packed: Tensor, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return two codes a byte, the even column low, ``uint8 [rows, groups * 8]``, scales
        ``float8_e4m3fn [rows, groups]`` and divisors ``float32 [rows, 1]``."""


class Int8Rows(Protocol):
    """Rows of signed bytes with their largest magnitude, as LLM.int8 has them."""

    def split_packed_rows(self, packed: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
        """Return codes ``int8 [rows, in]`` and magnitudes ``float32 [rows]``."""


class OrderedRows(Protocol):
    """Integer rows whose groups are of columns in another order than the weight's."""

    @property
    def inner(self) -> Any:
        """The codec of rows with sorted columns."""

    def list_column_groups(self, packed: Tensor | None = None) -> Tensor:
        """Return the group of each column of the weight, ``int32 [in]``.

        Args:
            packed: rows of one weight, where several have orders of their own.
        """

    def split_packed_rows(self, packed: Tensor, in_features: int) -> AffineParts:
        """Return codes in the weight's order, scales and zeros of groups."""


class GridRows(Protocol):
    """Rows whose codes can be chosen again while their scales stay (``quant.kept_grid``)."""

    @property
    def code_bits(self) -> int:
        """Bits of a code; a row begins with its codes."""

    def encode_on_grid(self, values: Tensor, kept: Tensor, in_features: int) -> Tensor:
        """Return finite ``values`` [n, in] in the codes of ``kept``'s scales, ``uint8 [n,
        row_bytes]``. Of decoded rows it is ``kept``."""


class CodecDefaults:
    """Facts of a quantizing codec whose rows no other library has."""

    @property
    def is_quantized(self) -> bool:
        """True."""
        return True

    @property
    def affine_rows(self) -> AffineRows | None:
        """None: no integer codes with zeros."""
        return None

    @property
    def nf4_rows(self) -> Nf4Rows | None:
        """None: no NF4 codes."""
        return None

    @property
    def fp8_rows(self) -> Fp8Rows | None:
        """None: no FP8 codes."""
        return None

    @property
    def mxfp4_rows(self) -> Mxfp4Rows | None:
        """None: no MXFP4 codes."""
        return None

    @property
    def nvfp4_rows(self) -> Nvfp4Rows | None:
        """None: no NVFP4 codes."""
        return None

    @property
    def fp4_rows(self) -> Nf4Rows | None:
        """None: no FP4 codes of bitsandbytes."""
        return None

    @property
    def int8_rows(self) -> Int8Rows | None:
        """None: no codes of LLM.int8."""
        return None

    @property
    def ordered_rows(self) -> OrderedRows | None:
        """None: columns are in the weight's order."""
        return None

    @property
    def grid_rows(self) -> GridRows | None:
        """None: codes cannot be chosen without scales."""
        return None
