"""Bits and groups of integer formats, from ``quantization_config`` and the shapes of codes."""

from collections.abc import Iterable
from typing import Any

from dist_peft.core.errors import UserError
from dist_peft.model.prequantized.linear import UNQUANTIZED_HINT
from dist_peft.store.index import SafetensorsIndex

__all__ = ["check_bits", "find_common_group_size", "list_code_shapes", "read_group_size"]


def check_bits(value: Any, key: str, index: SafetensorsIndex) -> Any:
    """Return ``value``, bits of a code.

    Raises:
        UserError: others than 2, 3, 4 and 8.
    """
    if value not in (2, 3, 4, 8) or isinstance(value, bool):
        raise UserError(
            f"{index.path} has {key} {value!r} in its quantization_config; 2, 3, 4 and 8 are read: "
            f"{UNQUANTIZED_HINT}"
        )
    return value


def read_group_size(value: Any, index: SafetensorsIndex) -> int:
    """Return ``value``, columns of a group.

    Raises:
        UserError: no positive multiple of 8.
    """
    if not isinstance(value, int) or value < 8 or value % 8:
        raise UserError(
            f"{index.path} has group_size {value!r} in its quantization_config; multiples of 8 "
            f"are read: {UNQUANTIZED_HINT}"
        )
    return value


def list_code_shapes(index: SafetensorsIndex, mark: str) -> list[tuple[int, ...]]:
    """Return the shapes of the matrices with the codes."""
    infos = [info for name, info in index.tensors.items() if name.endswith(mark)]
    return [info.shape for info in infos if len(info.shape) == 2]


def find_common_group_size(inputs: Iterable[int], index: SafetensorsIndex) -> int:
    """Return the largest group size that divides every linear's in_features."""
    inputs = list(inputs)
    for size in (128, 64, 32, 16, 8):
        if not any(count % size for count in inputs):
            return size
    raise UserError(
        f"{index.path} has linears whose in_features 8 does not divide; {UNQUANTIZED_HINT}"
    )
