"""Packed rows: cutting them into fields, putting them together, encoding in bounded chunks.

Every codec stores a frozen weight ``[rows, in]`` as one ``uint8`` tensor ``[rows, row_bytes]``.
A row holds all that its decoding needs, so any range of rows is complete by itself::

    row r   | codes ........ | scales .... | 0 0 |
            ^ byte 0         ^             ^ zero bytes up to a multiple of 4

``row_bytes`` is a multiple of 4, and so is the start of every field of 4-byte numbers. Numbers are
stored in the machine's byte order; all supported machines are little-endian.

Nothing here looks across rows. That makes ``encode(w)[a:b]`` and ``encode(w[a:b])`` the
same bytes: sums and means over rows, and reductions whose order depends on the number of threads,
must not enter a codec.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dist_peft.core.span import Span
from dist_peft.quant.assumed_device import get_assumed_device

__all__ = [
    "align_to_4_bytes",
    "check_finite_statistics",
    "check_float_weight",
    "check_packed_rows",
    "count_chunk_rows",
    "divide_exactly",
    "list_row_chunks",
    "quantize_in_groups",
    "read_packed_field",
    "view_as_bytes",
]

CHUNK_ELEMENTS = 2**18
"""Weights quantized or dequantized at a time. A float32 temporary has 1 MiB, about seven live at
once: below the size that the allocator maps and clears each time while a model is loaded
(``core.host_memory``). With half as many weights the calls of sixty small operations took a third
of the time, and more chunks do not make it shorter."""

_DEVICE_CHUNK_ELEMENTS = 2**22
"""The same on a GPU, where each chunk costs dozens of launches."""


def align_to_4_bytes(num_bytes: int) -> int:
    """``num_bytes`` rounded up to a multiple of 4."""
    return -(-num_bytes // 4) * 4


def view_as_bytes(numbers: Tensor) -> Tensor:
    """``[n, m]`` -> ``uint8 [n, m * itemsize]``, a copy.

    ``contiguous`` would not do: for it the stride of a dimension of size 1, or of none, is no
    matter, but for ``view`` it is.
    """
    return numbers.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def count_chunk_rows(in_features: int, device: torch.device) -> int:
    """Rows with at most 2^18 weights, 2^22 on a GPU; at least one."""
    elements = CHUNK_ELEMENTS if device.type == "cpu" else _DEVICE_CHUNK_ELEMENTS
    return max(1, elements // max(1, in_features))


def list_row_chunks(rows: int, in_features: int, device: torch.device) -> list[Span]:
    """Spans of ``count_chunk_rows`` rows each; the first alone where a device is assumed."""
    assumed = get_assumed_device()
    chunk_rows = count_chunk_rows(in_features, assumed or device)
    if 0 < rows <= chunk_rows:
        return [Span(0, rows)]
    spans = list(Span(0, rows).split_into_chunks(chunk_rows))
    return spans if assumed is None else spans[:1]


def check_float_weight(weight: Tensor) -> None:
    """Raise ValueError unless ``weight`` is a floating-point matrix."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"a weight to encode is a floating-point matrix [rows, in], "
            f"not {weight.dtype} {list(weight.shape)}"
        )


def check_packed_rows(packed: Tensor, row_bytes: int, name: str, in_features: int) -> None:
    """Raise ValueError unless ``packed`` is ``uint8 [rows, row_bytes]``."""
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != row_bytes:
        raise ValueError(
            f"rows of codec {name} with in_features={in_features} are uint8 [rows, {row_bytes}], "
            f"not {packed.dtype} {list(packed.shape)}"
        )


def check_finite_statistics(statistics: Tensor, group_size: int, first_row: int) -> None:
    """Raise ValueError when a group's statistic ``[rows, groups]`` shows a NaN or an infinity.

    The maximum or minimum of a group is not finite when one of its weights is not, so that this
    costs no pass over the weights themselves.
    """
    finite = torch.isfinite(statistics)
    if not bool(finite.all()):
        row, group = (int(i) for i in (~finite).nonzero()[0])
        raise ValueError(
            f"weight is not finite: NaN or infinity in row {first_row + row}, "
            f"columns {group * group_size} to {(group + 1) * group_size - 1}"
        )


def divide_exactly(numbers: Tensor, divisor: float) -> Tensor:
    """Correctly rounded quotients on every device.

    torch on CUDA divides by a Python number by multiplying with its reciprocal; it does not so
    with a tensor.
    """
    return numbers / torch.full((), divisor, dtype=numbers.dtype, device=numbers.device)


def quantize_in_groups(
    weight: Tensor,
    group_size: int,
    row_bytes: int,
    encode: Callable[[Tensor, int], Sequence[Tensor]],
) -> Tensor:
    """Run ``encode`` over chunks of rows and lay its fields side by side.

    Args:
        weight: ``[rows, in]``, any float type; 0 rows are allowed.
        group_size: rows are zero-padded at their end to whole groups of this many weights.
        row_bytes: bytes of a packed row.
        encode: ``(float32 [n, groups, group_size], index of the first row)`` -> fields, each
            ``[n, k]`` of any type, in the order of the layout. It must not write to its input,
            which may be the caller's weight.

    Returns:
        ``uint8 [rows, row_bytes]``.
    """
    check_float_weight(weight)
    rows, in_features = weight.shape
    groups = -(-in_features // group_size)
    packed = torch.empty(rows, row_bytes, dtype=torch.uint8, device=weight.device)
    with torch.no_grad():
        for span in list_row_chunks(rows, in_features, weight.device):
            chunk = weight[span.slice].float()
            if in_features % group_size:
                chunk = functional.pad(chunk, (0, groups * group_size - in_features))
            start = 0
            for part in encode(chunk.reshape(len(span), groups, group_size), span.start):
                part_bytes = part.contiguous().view(torch.uint8)
                stop = start + part_bytes.shape[1]
                packed[span.slice, start:stop] = part_bytes
                start = stop
            packed[span.slice, start:] = 0
    return packed


def read_packed_field(packed: Tensor, start: int, count: int, dtype: torch.dtype) -> Tensor:
    """Copy ``count`` numbers of ``dtype`` from byte ``start`` of every row: ``[rows, count]``.

    A copy, since a view would need rows and storage that are aligned for ``dtype``, and engines
    place packed rows where they like.
    """
    part = packed[:, start : start + count * dtype.itemsize]
    return part.clone(memory_format=torch.contiguous_format).view(dtype)
