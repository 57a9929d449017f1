"""Prequantized directories: detected from ``config.json``, read without requantization.

    quantization_config.quant_method     read
    dist_peft                            our own packed rows, ``STEM.packed``
    gptq                                 layouts gptq and gptq_v2, with act-order too (also experts)
    awq                                  layout gemm
    bitsandbytes                         NF4 and FP4, with and without double quantization; LLM.int8
    compressed-tensors                   integers, FP8, NVFP4 and MXFP4, by ``format``
    fp8                                  FP8 with a scale for each tile of weights, or one a tensor
    mxfp4                                gpt-oss: experts in MXFP4

The codec of such a base is the directory's; ``base.quant`` may repeat it and not contradict it.
The tensors in the files decide which linears are packed, not lists of names in the settings: a
linear with a plain ``STEM.weight`` is kept in ``base.compute_dtype``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import ValidationError
from torch import Tensor

from dist_peft.core.config.run import BaseConfig, QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.hub import read_json_object
from dist_peft.model.prequantized.bnb import BitsandbytesFormat, LlmInt8Format
from dist_peft.model.prequantized.fp4_linears import CompressedMxfp4Format, Nvfp4Format
from dist_peft.model.prequantized.fp8_linears import CompressedFp8Format, TiledFp8Format
from dist_peft.model.prequantized.integer import AwqFormat, CompressedTensorsFormat, GptqFormat
from dist_peft.model.prequantized.linear import (
    UNQUANTIZED_HINT,
    PackedFormat,
    PackedLinear,
    Settings,
    find_layout,
    require_tensor,
)
from dist_peft.model.prequantized.mxfp4_stacks import Mxfp4Format
from dist_peft.quant.codec import describe_quant, list_quant_keys, make_codec
from dist_peft.store.index import SafetensorsIndex, TensorInfo
from dist_peft.store.reader import RowReader

__all__ = ["OWN_METHOD", "PrequantizedBase", "check_stated_quant", "open_prequantized"]

OWN_METHOD = "dist_peft"


@dataclass(frozen=True)
class _PackedRowsLinear(PackedLinear):
    def _read_packed(self, reader: RowReader, span: Span) -> Tensor:
        return reader.read_rows(f"{self.stem}.packed", span)


@dataclass(frozen=True)
class _PackedRowsFormat(PackedFormat):
    """Rows packed by this project's codecs: ``STEM.packed`` uint8 ``[out, row_bytes]``."""

    MARK: ClassVar[str] = ".packed"
    OTHERS: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_settings(cls, settings: Settings, index: SafetensorsIndex) -> Self:
        # options without effect for a kind keep their default, so that a run does not warn of them
        known = {"kind", *list_quant_keys(str(settings.get("kind")))}
        try:
            quant = QuantConfig(**{key: settings[key] for key in known & settings.keys()})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UserError(
                f"{index.path / 'config.json'}: quantization_config {where}: {first['msg']}"
            ) from None
        return cls(OWN_METHOD, quant)

    @property
    def quant_keys(self) -> tuple[str, ...]:
        """All keys of the kind."""
        return list_quant_keys(self.quant.kind)

    def open_linear(
        self, index: SafetensorsIndex, stem: str, out_features: int, in_features: int
    ) -> PackedLinear:
        codec = make_codec(self.quant, torch.float32)
        shape = (out_features, codec.num_row_bytes(in_features))
        require_tensor(index, f"{stem}.packed", shape, (torch.uint8,))
        return _PackedRowsLinear(stem, out_features, in_features, codec)


_FORMATS: Mapping[str, type[PackedFormat]] = {
    OWN_METHOD: _PackedRowsFormat,
    "gptq": GptqFormat,
    "awq": AwqFormat,
    "bitsandbytes": BitsandbytesFormat,
    "compressed-tensors": CompressedTensorsFormat,
    "fp8": TiledFp8Format,
    "mxfp4": Mxfp4Format,
}
"""``quant_method`` -> format."""

_FLOAT_LAYOUTS: Mapping[str, type[PackedFormat]] = {
    "float-quantized": CompressedFp8Format,
    "nvfp4-pack-quantized": Nvfp4Format,
    "mxfp4-pack-quantized": CompressedMxfp4Format,
}
"""``format`` of compressed-tensors -> format; all others are read, or refused, as integers."""

_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where AutoGPTQ and AutoAWQ wrote their settings before ``config.json`` had them."""


class PrequantizedBase:
    """A prequantized directory.

    Attributes:
        format: its format, from the settings.
        tensors: its tensors under the names of an unquantized base, in the order of the files;
            None for a packed weight.
    """

    def __init__(self, format: PackedFormat, index: SafetensorsIndex) -> None:
        self.format, self._index = format, index
        self.tensors: dict[str, TensorInfo | None] = {}
        mark = format.MARK
        stems = {name.removesuffix(mark) for name in index.tensors if name.endswith(mark)}
        parts = {stem + ending for stem in stems for ending in (mark, *format.OTHERS)}
        for name, info in index.tensors.items():
            if name.endswith(mark):
                self.tensors[f"{name.removesuffix(mark)}{format.WEIGHT}"] = None
            elif name not in parts:
                self.tensors[name] = info
        if not stems:
            raise UserError(
                f"{index.path} says in config.json that it is quantized ({format.label}), but has "
                f"no tensor *{mark}; remove quantization_config if it is not"
            )

    def __str__(self) -> str:
        return f"{self.format_label}: {describe_quant(self.quant_config, self.format.quant_keys)}"

    @property
    def format_label(self) -> str:
        return self.format.label

    @property
    def quant_config(self) -> QuantConfig:
        """The packing of the linears as a ``base.quant`` section."""
        return self.format.quant

    @property
    def scale_tile(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale; None: scales are of parts of a row, or of all."""
        return self.format.scale_tile

    def open_linear(self, weight: str, out_features: int, in_features: int) -> PackedLinear | None:
        """Return the packed linear of this weight; None if it is not packed."""
        if self.tensors[weight] is not None:
            return None
        stem = weight.removesuffix(self.format.WEIGHT)
        return self.format.open_linear(self._index, stem, out_features, in_features)

    def describe_scale_rounding(self) -> str | None:
        """Return a note on scales that were rounded to float16; None if all were exact."""
        if not (worst := self.format.rounding.worst):
            return None
        return (
            f"scales of {self._index.path} are rounded to float16: they changed by at most "
            f"{worst:.2%} in the rows read here"
        )


def open_prequantized(directory: Path, index: SafetensorsIndex) -> PrequantizedBase | None:
    """Read the quantization settings of a directory; None for an unquantized base.

    Raises:
        UserError: a method, variant or setting that is not supported.
    """
    file = directory / "config.json"
    settings: Any = read_json_object(file).get("quantization_config")
    if settings is None and any(name.endswith(GptqFormat.MARK) for name in index.tensors):
        for name, known in _BESIDE.items():
            if (directory / name).is_file():
                file = directory / name
                settings = {**read_json_object(file), "quant_method": known}
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise UserError(f"{file}: quantization_config is {settings!r}, not a section")
    method = settings.get("quant_method")
    if method is None and ("load_in_4bit" in settings or "load_in_8bit" in settings):
        method = "bitsandbytes"
    if not isinstance(method, str) or method not in _FORMATS:
        raise UserError(
            f"{file}: quantization_config has quant_method {method!r}; read are "
            f"{', '.join(_FORMATS)}; {UNQUANTIZED_HINT}"
        )
    chosen = _FORMATS[method]
    if chosen is CompressedTensorsFormat:
        chosen = _FLOAT_LAYOUTS.get(str(find_layout(settings)), chosen)
    if chosen is BitsandbytesFormat and not settings.get("load_in_4bit"):
        chosen = LlmInt8Format
    return PrequantizedBase(chosen.from_settings(settings, index), index)


def check_stated_quant(base: BaseConfig, found: PrequantizedBase, directory: Path) -> None:
    """Check that ``base.quant``, where the user set it, agrees with the directory.

    Raises:
        UserError: they differ.
    """
    if "quant" not in base.model_fields_set:
        return
    has = f"{directory} is quantized already ({found})"
    if base.quant is not None and base.quant.embeddings:
        raise UserError(
            f"base.quant.embeddings is true, but {has}, and its embedding and head are kept as "
            "they are; set it to false, or give the unquantized base"
        )
    if base.quant is None:
        raise UserError(f"base.quant is null, but {has}; leave base.quant out")
    for key in found.format.quant_keys:
        stated, own = getattr(base.quant, key), getattr(found.quant_config, key)
        if key in base.quant.model_fields_set and stated != own:
            raise UserError(
                f"base.quant.{key} is {stated}, but {has}; leave base.quant out, the directory "
                "decides"
            )
