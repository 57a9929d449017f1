"""The arguments and the result of a format's writer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.export.merged_weights import CHUNK_BYTES, MergedWeights, State, open_merged_weights
from dist_peft.export.model_directory import WriteResult
from dist_peft.model.skeleton import parse_torch_dtype
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.codec import make_codec
from dist_peft.store.publish import check_output_free

__all__ = ["ExportResult", "ExportSpec"]


@dataclass(frozen=True)
class ExportSpec:
    """Inputs and options of one export.

    Attributes:
        base: the run's base configuration.
        directory: directory of the base's files.
        adapter_dir: directory of the run's adapter.
        out: output directory, or file of a gguf.
        pooled: the adapter is a QA-LoRA adapter and fits into the zeros of the base.
        trained_codes: the adapter was trained through the quantizer of the base.
        into: rows that plain LoRA is merged into before quantization.
        options: values of the format's options (``ExportFormat.options``) by ``ExportOption.key``;
            an absent one is not set.
        chunk_bytes: size of a chunk of rows in float32.
        overwrite: replace an export that is in ``out``.
        rescale: see ``MergedWeights``.
    """

    base: BaseConfig
    directory: Path
    adapter_dir: Path
    out: Path
    pooled: bool = False
    trained_codes: bool = False
    into: Literal["original", "decoded"] = "original"
    options: Mapping[str, Any] = field(default_factory=dict)
    chunk_bytes: int = CHUNK_BYTES
    overwrite: bool = False
    rescale: Callable[[str, Tensor, int], Tensor] | None = None

    def check_output(self) -> None:
        """Check that directory ``out`` may be written; raises UserError if not."""
        inputs = (self.directory, self.adapter_dir)
        check_output_free(self.out, overwrite=self.overwrite, inputs=inputs)

    @property
    def compute_dtype(self) -> torch.dtype:
        return parse_torch_dtype(self.base.compute_dtype)

    @property
    def integer_codec(self) -> AffineCodec | None:
        """Codec that re-quantizes with the bits and groups of an integer base; None for another
        base."""
        rows = make_codec(self.base.quant, self.compute_dtype).affine_rows
        return None if rows is None else AffineCodec(rows.bits, rows.group_size)

    @property
    def merge_state(self) -> State:
        """State of the weights for formats that store the merged model."""
        return "codes" if self.pooled else self.into

    @property
    def rows_state(self) -> State:
        """State of the weights for formats that quantize merged rows of every run."""
        return "decoded" if self.pooled else self.into

    @property
    def codes_state(self) -> State | None:
        """State of the weights in which an integer base's codes hold the adapter; None: in no
        state, and formats quantize merged rows."""
        if self.pooled:
            return "codes"
        return "trained" if self.trained_codes and self.integer_codec is not None else None

    @contextmanager
    def open_weights(self, state: State | None = None) -> Iterator[MergedWeights]:
        """Open the base and the adapter with ``open_merged_weights``; ``state`` defaults to
        ``merge_state``.

        Raises:
            UserError: an error of ``open_merged_weights``.
        """
        state = state or self.merge_state
        with open_merged_weights(
            self.base, self.directory, self.adapter_dir, state, self.chunk_bytes
        ) as walk:
            walk.rescale = self.rescale
            yield walk

    def make_target_codec(self, group_size: int) -> AffineCodec:
        """Return the codec of the output: that of the options ``bits`` and ``group_size``, the
        base's, or 4 bits in ``group_size``.

        Raises:
            UserError: the requested bits or group size differ from those of kept codes.
        """
        own = self.integer_codec or AffineCodec(4, group_size)
        asked = (
            self.options.get("bits") or own.bits,
            self.options.get("group_size") or own.group_size,
        )
        if self.codes_state is not None and asked != (own.bits, own.group_size):
            run = "QA-LoRA run" if self.pooled else "run trained through the quantizer"
            raise UserError(
                f"a {run} keeps the codes of its base, {own.bits} bits in groups of "
                f"{own.group_size}; leave out --bits and --group-size"
            )
        if asked[1] % 8:
            raise UserError(f"--group-size {asked[1]} is not a multiple of 8")
        return AffineCodec(*asked)


@dataclass(frozen=True)
class ExportResult:
    """Result of an export.

    Attributes:
        written: counts of tensors and sizes.
        path: the file or directory that the consumer loads.
        how: a short description of the conversion, for reports.
        exact: the form keeps the trained function, so that it may differ by rounding only.
    """

    written: WriteResult
    path: Path
    how: str
    exact: bool = False
