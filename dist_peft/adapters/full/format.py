"""Trained weights of the base on disk: written by ``full`` and ``partial`` to ``adapter/``.

::

    model.safetensors   float32 masters under the names of the base's files (several files and an
                        index if they are large)
    dist_peft.json      ``kind``: full or partial, the fingerprint of the base, versions,
                        ``tensors``: the names in model.safetensors

PEFT has no such format: its ``modules_to_save`` holds whole modules along with an adapter. So there
is no ``adapter_config.json`` here; ``dist-peft merge`` makes a model of it.

Weights are written one by one, so that no rank holds all of them; ``store.publish`` lets the
directory appear as a whole.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor

from dist_peft.adapters.metadata import WEIGHT_KINDS, read_adapter_metadata
from dist_peft.adapters.tensor_checks import (
    check_tensor_names,
    check_tensor_type,
    check_tensor_values,
)
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.quant.codec_defaults import AffineParts, AffineRows
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader
from dist_peft.store.staged_model import StagedModel
from dist_peft.store.writer import TensorSpec, write_atomically

__all__ = ["TrainedWeightsMerger", "WeightsWriter", "contains_trained_weights"]

_CHECKED_BYTES = 64 * 2**20
"""Read at a time to look for values that are not finite."""


def contains_trained_weights(adapter_dir: Path) -> bool:
    """Return whether ``WeightsWriter`` wrote this directory, rather than an adapter."""
    return read_adapter_metadata(adapter_dir).get("kind") in WEIGHT_KINDS


class WeightsWriter:
    """Writes ``directory`` tensor by tensor; it appears when it is complete.

    A context manager: leaving it by an exception leaves nothing, not even of a killed process.

    Args:
        directory: an older one is replaced.
        shapes: name in the base's files -> shape, of everything that will be written.
        metadata: contents of ``dist_peft.json``.

    Raises:
        UserError: too little space, or no permission.
    """

    def __init__(
        self, directory: Path, shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, Any]
    ) -> None:
        assert metadata["kind"] in WEIGHT_KINDS
        self.metadata = {**metadata, "tensors": sorted(shapes)}
        specs = [TensorSpec(n, torch.float32, tuple(shape)) for n, shape in shapes.items()]
        self._staged = StagedModel(directory, specs)
        self._failure: UserError | None = None

    @property
    def staged_directory(self) -> Path:
        """The hidden directory that will be published; for further files."""
        return self._staged.directory

    def write_parameter(self, name: str, whole: Tensor) -> None:
        """Write one tensor. ``close`` raises disk-full errors: ranks must keep gathering."""
        if self._failure is not None:
            return
        try:
            self._staged.write_rows(name, whole.float())
        except UserError as error:
            self._failure = error

    def close(self) -> None:
        """Publish.

        Raises:
            UserError: the disk is full.
        """
        with self:
            if self._failure is not None:
                raise self._failure
            text = json.dumps(self.metadata, indent=2) + "\n"
            write_atomically(self._staged.directory / "dist_peft.json", text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._staged.__exit__(kind, error, trace)


class TrainedWeightsMerger:
    """Reads such a directory for a merge: trained rows in the place of the base's.

    The counterpart of ``adapters.lora.merge.LoraMerger``.

    Args:
        adapter_dir: written by ``WeightsWriter``.
        names: path of each of the base's weights -> its name in the base's files.
        reader: of the trained tensors.
    """

    def __init__(self, adapter_dir: Path, names: Mapping[str, str], reader: RowReader) -> None:
        self.adapter_dir, self._reader = adapter_dir, reader
        self._names = {p: n for p, n in names.items() if n in reader.index.tensors}
        left = set(reader.index.tensors) - set(self._names.values())
        self._rows_left = {n: reader.index.tensors[n].num_rows for n in self._names.values()}
        self._rows_left |= dict.fromkeys(left, 1)

    @classmethod
    def open_directory(
        cls, adapter_dir: Path, names: Mapping[str, str], stack: ExitStack
    ) -> "TrainedWeightsMerger":
        """Open the files; ``stack`` closes them.

        Raises:
            UserError: they are damaged or absent, or lack a tensor that was trained.
        """
        index = SafetensorsIndex.open(adapter_dir)
        check_tensor_names(
            read_adapter_metadata(adapter_dir).get("tensors"), index.tensors, adapter_dir
        )
        return cls(adapter_dir, names, stack.enter_context(RowReader(index)))

    def check_weight_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Before a row is merged: every trained tensor fits the base and holds finite numbers.

        Reads all trained tensors once more, in chunks.

        Args:
            shapes: weight -> rows and elements of a row in the base.

        Raises:
            UserError: one does not.
        """
        tensors = self._reader.index.tensors
        if left := set(tensors) - set(self._names.values()):
            raise UserError(
                f"{self.adapter_dir} has {sorted(left)[0]}, which the base does not have: it "
                "belongs to another base"
            )
        for weight, name in self._names.items():
            info = tensors[name]
            own = (info.num_rows, torch.Size(info.shape[1:]).numel())
            check_tensor_type(name, info.dtype, self.adapter_dir)
            if shapes.get(weight, own) != own:
                raise UserError(
                    f"{self.adapter_dir}: {name} has shape {list(info.shape)}, but the base's is "
                    f"{list(shapes[weight])}; it belongs to another base"
                )
        for name in dict.fromkeys(self._names.values()):
            info = tensors[name]
            rows = max(1, _CHECKED_BYTES // max(1, info.row_bytes))
            for span in Span(0, info.num_rows).split_into_chunks(rows):
                check_tensor_values({name: self._reader.read_rows(name, span)}, self.adapter_dir)

    def changes_weight(self, weight: str) -> bool:
        """Whether this weight was trained."""
        return weight in self._names

    def merge_weight_rows(
        self, weight: str, rows: Tensor, span: Span, in_base: Literal["original", "decoded"]
    ) -> Tensor:
        """The trained rows ``span``, float32; ``rows`` are the base's.

        Raises:
            UserError: the shapes show that they belong to another base.
        """
        name = self._names[weight]
        info = self._reader.index.tensors[name]
        if span.stop > info.num_rows or rows.shape[1:] != info.shape[1:]:
            raise UserError(
                f"{self.adapter_dir}: {name} has shape {list(info.shape)}, but the base has rows "
                f"up to {span.stop} of {list(rows.shape[1:])} elements; it belongs to another base"
            )
        self._rows_left[name] -= len(span)
        return self._reader.read_rows(name, span)

    def compute_encoded_rows(self, weight: str, rows: Tensor, span: Span) -> Tensor:
        """Nothing was taken from the base before it was encoded."""
        return rows

    def finish_packed_rows(
        self, weight: str, packed: Tensor, span: Span, rows: AffineRows | None, columns: int
    ) -> Tensor:
        """Return ``packed``: no zeros were trained."""
        return packed

    def merge_affine_parts(self, weight: str, parts: AffineParts, span: Span) -> AffineParts:
        raise AssertionError("trained weights have no codes of the base")

    def compute_group_change(self, weight: str, parts: AffineParts, span: Span) -> Tensor:
        raise AssertionError("trained weights have no codes of the base")

    def list_unused_tensors(self) -> list[str]:
        """Trained tensors of which not every row was merged."""
        return [name for name, rows in self._rows_left.items() if rows > 0]
