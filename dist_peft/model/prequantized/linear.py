"""Base classes of the formats of prequantized directories.

A directory keeps the weight of a linear ``STEM.weight`` as several tensors ``STEM.*``. A
``PackedFormat`` knows their names and shapes, and a ``PackedLinear`` reads the part of them that
belongs to some rows and returns these rows packed by a codec of this project.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.quant.codec import Codec, list_quant_keys
from dist_peft.quant.import_formats import check_packed_statistics, to_half
from dist_peft.store.index import SafetensorsIndex, TensorInfo
from dist_peft.store.reader import RowReader

__all__ = [
    "UNQUANTIZED_HINT",
    "PackedFormat",
    "PackedLinear",
    "ScaleRounding",
    "Settings",
    "count_whole_groups",
    "find_layout",
    "read_only_group",
    "refuse_extras",
    "require_tensor",
]

UNQUANTIZED_HINT = "give the unquantized base, which is quantized while it is read"
"""Remedy named in messages about unsupported directories."""

Settings = Mapping[str, Any]
"""``quantization_config`` of a ``config.json``."""


@dataclass
class ScaleRounding:
    """Largest change of scales by rounding to float16, over all rows read so far."""

    worst: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def __deepcopy__(self, memo: object) -> "ScaleRounding":
        """The same object: a copied model (``plan``) reads the same files."""
        return self

    def round_scale(self, scale: Tensor) -> Tensor:
        """Round scales to float16.

        Raises:
            ValueError: a scale is out of range.
        """
        half, change = to_half(scale)
        with self._lock:
            self.worst = max(self.worst, change)
        return half


@dataclass(frozen=True)
class PackedLinear(ABC):
    """One linear of a prequantized directory.

    Attributes:
        stem: prefix of the names of its tensors.
        out_features, in_features: shape of the weight.
        codec: of the rows that ``read`` returns.
    """

    stem: str
    out_features: int
    in_features: int
    codec: Codec

    @property
    def has_middle_zeros(self) -> bool:
        """Whether its codes are integers without zero points: all zeros are half of the range."""
        return False

    def read_packed_rows(self, reader: RowReader, span: Span) -> Tensor:
        """Read packed rows ``uint8 [len(span), row_bytes]``; reads at most one extra word at either
        end.

        Raises:
            UserError: damaged, or values that the codec cannot represent.
        """
        if not len(span):
            return torch.empty(0, self.codec.num_row_bytes(self.in_features), dtype=torch.uint8)
        try:
            packed = self._read_packed(reader, span)
            check_packed_statistics(packed, self.codec, self.in_features)
        except ValueError as error:
            raise UserError(
                f"{reader.index.path}: {self.stem} in rows {span.start} to {span.stop - 1}: {error}"
            ) from None
        if reader.hashes is not None:
            reader.hashes.add_packed_rows(self.weight_name, span.start, packed)
        return packed

    @property
    def weight_name(self) -> str:
        """Name of the weight in an unquantized base."""
        return f"{self.stem}.weight"

    @abstractmethod
    def _read_packed(self, reader: RowReader, span: Span) -> Tensor: ...


@dataclass(frozen=True)
class PackedFormat(ABC):
    """A format, as the settings of one directory describe it.

    Attributes:
        label: its name in messages, such as ``gptq_v2``.
        quant: the same as ``base.quant``.
        rounding: of scales, so far.
    """

    label: str
    quant: QuantConfig
    rounding: ScaleRounding = field(default_factory=ScaleRounding, compare=False)

    MARK: ClassVar[str]
    """Ending of the tensor that every packed linear has, behind its stem."""

    OTHERS: ClassVar[tuple[str, ...]]
    """Endings of the other tensors that it may have; its bias is none of them."""

    WEIGHT: ClassVar[str] = ".weight"
    """Ending of the weight in an unquantized base, behind the same stem."""

    @property
    def scale_tile(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale; None: scales are of parts of a row, or of all."""
        return None

    @property
    def quant_keys(self) -> tuple[str, ...]:
        """Keys of ``base.quant`` that the directory decides; other libraries record no solver."""
        return tuple(key for key in list_quant_keys(self.quant.kind) if key != "solver")

    @classmethod
    @abstractmethod
    def from_settings(cls, settings: Settings, index: SafetensorsIndex) -> "PackedFormat":
        """Build the format from the settings of a directory.

        Raises:
            UserError: a variant that is not read.
        """

    @abstractmethod
    def open_linear(
        self, index: SafetensorsIndex, stem: str, out_features: int, in_features: int
    ) -> PackedLinear:
        """Return the linear with this stem; its tensors are checked against the headers.

        Raises:
            UserError: a tensor is missing or contradicts the settings in shape or type.
        """


def require_tensor(
    index: SafetensorsIndex, name: str, shape: tuple[int, ...], dtypes: Iterable[torch.dtype]
) -> TensorInfo:
    """Return a required tensor of a packed linear.

    Raises:
        UserError: it is missing, or has another shape or type than the format requires.
    """
    if name not in index.tensors:
        raise UserError(
            f"{index.path} has other tensors of a packed linear but no {name}: it is incomplete; "
            "get it again"
        )
    info, dtypes = index.tensors[name], tuple(dtypes)
    if info.shape != shape or info.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = str(info.dtype).removeprefix("torch.")
        raise UserError(
            f"tensor {name} in {info.file} is {found} {list(info.shape)}, but by config.json "
            f"(quantization_config and the model's sizes) it is {wanted} {list(shape)}: a variant "
            f"that is not read; {UNQUANTIZED_HINT}"
        )
    return info


def read_only_group(settings: Settings, index: SafetensorsIndex) -> Settings:
    """Return the only config group of compressed-tensors.

    Raises:
        UserError: there are several, or none.
    """
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        count = len(groups) if isinstance(groups, dict) else 0
        raise UserError(
            f"{index.path} has {count} config_groups in its quantization_config; a base with one "
            f"is read: {UNQUANTIZED_HINT}"
        )
    (group,) = groups.values()
    found: Settings = group if isinstance(group, dict) else {}
    return found


def find_layout(settings: Settings) -> Any:
    """Return ``format`` of compressed-tensors, that of its first config group if it has one."""
    groups = settings.get("config_groups")
    listed = [*groups.values()] if isinstance(groups, dict) else []
    own = [group.get("format") for group in listed if isinstance(group, dict)]
    return (own[0] if own else None) or settings.get("format")


def refuse_extras(
    settings: Settings,
    group: Settings,
    weights: Settings,
    index: SafetensorsIndex,
    *,
    activations: bool = False,
) -> None:
    """Refuse settings of compressed-tensors that change the function.

    Args:
        group: the only config group.
        weights: of it.
        activations: rounding of activations is accepted, and left out.

    Raises:
        UserError: names the first.
    """
    sparsity = settings.get("sparsity_config") or {}
    extras = {
        "input_activations": None if activations else group.get("input_activations"),
        "output_activations": None if activations else group.get("output_activations"),
        "transform_config": settings.get("transform_config"),
        "sparsity_config": sparsity.get("format", "dense") != "dense",
        "dynamic": weights.get("dynamic"),
    }
    for name, value in extras.items():
        if value:
            raise UserError(
                f"{index.path} has {name} in its quantization_config, which is more than packed "
                f"weights; {UNQUANTIZED_HINT}"
            )


def count_whole_groups(stem: str, in_features: int, group_size: int) -> int:
    """Return the number of groups of a row.

    Raises:
        UserError: the last one would not be whole.
    """
    if in_features % group_size:
        raise UserError(
            f"{stem} has {in_features} in_features, which groups of {group_size} do not divide; "
            f"{UNQUANTIZED_HINT}"
        )
    return in_features // group_size
