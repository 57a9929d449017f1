"""Iterate over the weights of a run, tensor by tensor in row chunks, for every export.

A chunk is read from the base's files, converted to the requested state and handed on; nothing else
is in memory. The states of a linear weight of the blocks:

    original   rows of the files + adapter
    decoded    rows as training saw them, ``decode(encode(rows))``, + adapter
    codes      codes and scales of the integer base; the adapter is in the zeros (QA-LoRA, exact)
    base       the base as training saw it, without the adapter: an integer base's codes, scales
               and zeros, an NF4 base's packed rows
    trained    the packed rows of training where they hold the adapter: through the quantizer

The packed rows of a prequantized base are those of its files. It has no full-precision rows, so
that ``original`` also means the dequantized rows.

The first two states return float32 rows, the others ``AffineParts`` with float32 zeros. All other
tensors (embeddings, norms, biases, the head) are rows of the files in every state; an adapter of
one of them is merged except in ``base``. An embedding and a head that ``base.quant.embeddings``
packs are rows as training saw them except in ``original``. Tensors of a classifier's head may be
absent from the files: the adapter stores them in full.
"""

import logging
import math
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dist_peft.adapters.directory import keeps_zeros_of_base, open_merger
from dist_peft.adapters.full.format import contains_trained_weights
from dist_peft.adapters.low_rank.blocked_product import BLOCK_ROWS
from dist_peft.adapters.metadata import read_adapter_metadata
from dist_peft.adapters.protocol import WeightMerger
from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.core.span import Span
from dist_peft.export.base_weights import BaseWeight, list_base_weights
from dist_peft.model.base_hashes import build_row_hashes
from dist_peft.model.frozen_linear import WeightRows
from dist_peft.model.skeleton import Skeleton, build_skeleton
from dist_peft.quant.affine import AffineParts, dequantize_affine_parts
from dist_peft.quant.codec_defaults import OrderedRows
from dist_peft.store.base_record import BaseRecord
from dist_peft.store.holding_reader import HoldingReader
from dist_peft.store.reader import RowReader

__all__ = [
    "CHUNK_BYTES",
    "MergedWeights",
    "State",
    "open_merged_weights",
]

log = logging.getLogger("dist_peft")

State = Literal["original", "decoded", "codes", "base", "trained"]

_PACKED_STATES = ("codes", "base", "trained")
KeptZeros = Literal["none", "files", "trained"]

_GIVE_ITS_BASE = "set base.path in the run's config.yaml to the one it was trained on"

CHUNK_BYTES = 8 * 2**20
"""Most bytes of a chunk of rows in float32, by default: the allocator uses such memory again
(``core.host_memory``)."""

_CACHED_BYTES = 4 * 2**20
"""Bytes of a chunk where that is ``BLOCK_ROWS`` rows or more: small enough for a processor's cache
from reading to writing, large enough to hide a call's cost."""


class MergedWeights:
    """Read the weights of a base with an adapter chunk by chunk; created by
    ``open_merged_weights``. Threads may read different weights at the same time
    (``weight_threads``).

    Args:
        state: state of the returned rows: original, decoded, codes, base or trained.
        record: content of the base that the adapter was trained on; None if unknown.
        zeros: weights that the adapter does not change (pruned bases). files: those of the blocks
            that are exactly 0 in the base's files. trained: those that are 0 as training saw them.
        trained_names: tensors of the base that were trained themselves, without an adapter.

    Attributes:
        chunk_bytes: most bytes of a chunk of rows in float32.
        weights: every tensor of the base, in the order of its files.
        rescale: changes merged rows, given their path and first row; None: nothing does.

    Raises:
        UserError: the adapter lacks a parameter of the head, or a shape does not fit the base.
    """

    rescale: Callable[[str, Tensor, int], Tensor] | None = None

    def __init__(
        self,
        skeleton: Skeleton,
        merger: WeightMerger,
        reader: RowReader,
        adapter_dir: Path,
        state: State,
        chunk_bytes: int = CHUNK_BYTES,
        record: BaseRecord | None = None,
        zeros: KeptZeros = "none",
        trained_names: Collection[str] = (),
    ) -> None:
        self._zeros = zeros
        self.skeleton, self.adapter_dir, self.state = skeleton, adapter_dir, state
        self._record = record
        self._merger, self._reader, self.chunk_bytes = merger, reader, chunk_bytes
        self._holding = threading.local()
        self.weights = list_base_weights(skeleton, trained_names)
        self._new = frozenset(skeleton.head.new if skeleton.head else ())
        if absent := sorted(name for name in self._new if not merger.changes_weight(name)):
            raise UserError(
                f"adapter {adapter_dir} has no {absent[0]}, a parameter of the classifier's head "
                "that the base does not have either; does it belong to another run?"
            )

        merger.check_weight_shapes(self._collect_weight_shapes())

    def _collect_weight_shapes(self) -> dict[str, tuple[int, int]]:
        """Map each path to rows and columns of its weight, which several tensors may share."""
        found: dict[str, tuple[int, int]] = {}
        for weight in self.weights:
            if weight.linear is None:
                columns = torch.Size(weight.info.shape[1:]).numel()
                found[weight.path] = (weight.num_rows, columns)
            else:
                stop = weight.span_in_linear(Span(0, weight.num_rows)).stop
                rows = max(stop, found.get(weight.path, (0, 0))[0])
                found[weight.path] = (rows, weight.num_columns)
        return found

    def is_adapted(self, weight: BaseWeight) -> bool:
        """Return whether the adapter changes this tensor."""
        return self._merger.changes_weight(weight.path)

    def keeps_codes(self, weight: BaseWeight) -> bool:
        """Return whether the packed rows of training are this weight's: they hold the adapter, or
        it has none and its rows of the files are not wanted."""
        if self.state == "trained":
            return True
        linear = weight.linear
        decoded = self.state == "decoded" or (linear is not None and linear.stored is not None)
        return decoded and not self.is_adapted(weight)

    def is_packable(self, weight: BaseWeight) -> bool:
        """Return whether a format may pack this weight: that of a block's linear, and in the
        states of codes one with codes (a prequantized base can have others)."""
        if weight.is_dense or self.state not in _PACKED_STATES:
            return weight.is_block_linear and not weight.is_dense
        if self.state == "codes":
            return self._has_affine_parts(weight)
        codec = weight.codec
        return weight.is_block_linear and codec is not None and codec.is_quantized

    @property
    def largest_held_bytes(self) -> int:
        """Bytes of the largest packed weight, which may be kept while its rows are read."""
        sizes = (
            weight.num_rows * weight.linear.codec.num_row_bytes(weight.num_columns)
            for weight in self.weights
            if weight.linear is not None and weight.linear.stored is not None
        )
        return max(sizes, default=0)

    def iterate_spans(self, weight: BaseWeight, multiple: int = 1) -> Iterator[Span]:
        """Yield row spans of at most ``chunk_bytes``; all but the last have a multiple of
        ``multiple`` rows, and at least that many."""
        row = 4 * max(1, torch.Size(weight.info.shape[1:]).numel())
        wanted = min(self.chunk_bytes // row, max(BLOCK_ROWS, _CACHED_BYTES // row))
        rows = max(1, wanted // multiple) * multiple
        block = math.lcm(multiple, BLOCK_ROWS)
        rows -= rows % block if rows > block else 0
        yield from Span(0, weight.num_rows).split_into_chunks(rows)

    def read_merged_rows(self, weight: BaseWeight, span: Span) -> Tensor:
        """Return rows as numbers: float32 where the state changes them, else the file's type; with
        ``rescale``, as it changes them."""
        rows = self._read_merged_rows(weight, span)
        return rows if self.rescale is None else self.rescale(weight.path, rows, span.start)

    def _read_merged_rows(self, weight: BaseWeight, span: Span) -> Tensor:
        linear = weight.linear
        if self.state in _PACKED_STATES and self._has_affine_parts(weight):
            parts = self.read_affine_parts(weight, span)
            return weight.to_stored_shape(dequantize_affine_parts(parts, weight.num_columns))
        adapted = self.is_adapted(weight) and self.state != "base"
        # includes the head: PiSSA subtracts its initial factors although it is not quantized
        as_trained = self.state in ("decoded", "base", "trained")
        if self.state == "codes":  # a packed head or embedding has no zeros to merge into
            as_trained = linear is not None and linear.codec.is_quantized
        decoded = linear is not None and (as_trained or linear.stored is not None)
        if decoded:
            assert linear is not None
            packed = self.read_packed_rows(weight, span)
            rows = linear.codec.dequantize_rows(packed, linear.in_features, torch.float32)
        elif weight.is_transposed or weight.is_part:
            assert linear is not None
            own = weight.span_in_linear(span)
            rows = linear.read_packed_rows(self._choose_reader(weight), own)
        elif weight.path in self._new:
            rows = torch.zeros(len(span), *weight.info.shape[1:])  # the adapter has all of it
        else:
            rows = self._reader.read_rows(weight.name, span)
        if not adapted:
            return rows if linear is None else weight.to_stored_shape(rows)
        into: Literal["original", "decoded"] = "decoded" if decoded else "original"
        if linear is None:
            return self._merger.merge_weight_rows(weight.path, rows, span, into)
        flat = rows.reshape(-1, weight.num_columns)
        merged = self._merger.merge_weight_rows(
            weight.path, flat, weight.span_in_linear(span), into
        )
        kept = self._find_kept_zeros(weight, flat, as_trained=decoded)
        if kept is not None:
            merged = torch.where(kept, flat.float(), merged)
        return weight.to_stored_shape(merged)

    def _find_kept_zeros(
        self, weight: BaseWeight, rows: Tensor, *, as_trained: bool
    ) -> Tensor | None:
        """Return which weights of ``rows`` of the base stay, ``bool [n, in]``; None: none of them.

        Args:
            as_trained: whether ``rows`` are those that training saw, or those of the files.
        """
        linear = weight.linear
        if self._zeros == "none" or linear is None:
            return None
        if self._zeros == "files":
            return rows == 0 if weight.is_block_linear else None
        if not as_trained:
            packed = WeightRows(linear, rows).to_packed()
            rows = linear.codec.dequantize_rows(packed, linear.in_features, torch.float32)
        return rows == 0

    def find_column_order(self, weight: BaseWeight) -> OrderedRows | None:
        """Return the order of a weight's columns where its codes are kept (act-order)."""
        kept = self.state in _PACKED_STATES and weight.is_block_linear and weight.codec
        return weight.codec.ordered_rows if kept and weight.codec else None

    def read_affine_parts(self, weight: BaseWeight, span: Span) -> AffineParts:
        """Return codes, scales and float32 zeros of a linear's rows on an integer base; codes in
        the weight's order of columns, groups in that of ``find_column_order``."""
        rows = self.find_column_order(weight) or (weight.codec and weight.codec.affine_rows)
        assert rows
        parts = rows.split_packed_rows(self.read_packed_rows(weight, span), weight.num_columns)
        parts = parts._replace(zero=parts.zero.float())
        if self.state == "codes" and self.is_adapted(weight):
            return self._merger.merge_affine_parts(weight.path, parts, span)
        return parts

    def _has_affine_parts(self, weight: BaseWeight) -> bool:
        codec = weight.codec
        return weight.is_block_linear and codec is not None and codec.affine_rows is not None

    def read_packed_rows(self, weight: BaseWeight, span: Span) -> Tensor:
        """Return a linear's packed rows as in training, ``uint8 [rows, row_bytes]``; with PiSSA
        and LoftQ those of the residual, without the product of the initial factors."""
        assert weight.linear is not None
        own = weight.span_in_linear(span)
        read = WeightRows.read_weight_rows(weight.linear, self._choose_reader(weight), own)
        packed = read.to_packed(partial(self._merger.compute_encoded_rows, weight.path, span=own))
        grid = weight.linear.codec.affine_rows
        return self._merger.finish_packed_rows(weight.path, packed, own, grid, weight.num_columns)

    def _choose_reader(self, weight: BaseWeight) -> RowReader:
        """Return the reader of a weight's rows; of a packed one, which the files may have
        transposed, a reader that keeps it until this thread comes to the next."""
        linear = weight.linear
        packed = linear is not None and linear.stored is not None
        turned = linear is not None and linear.is_transposed
        if not (packed or turned):
            return self._reader
        if getattr(self._holding, "name", None) != weight.name:
            self._holding.name, self._holding.reader = weight.name, HoldingReader(self._reader)
        found: RowReader = self._holding.reader
        return found

    def iterate_group_changes(self) -> Iterator[tuple[AffineParts, Tensor]]:
        """Yield affine parts and the change of each group by an adapter that fits into zeros, in
        the state ``base`` (``adapters.low_rank.zero_points``)."""
        for weight in self.weights:
            if self._has_affine_parts(weight) and self.is_adapted(weight):
                for span in self.iterate_spans(weight):
                    parts = self.read_affine_parts(weight, span)
                    yield parts, self._merger.compute_group_change(weight.path, parts, span)

    def check_all_consumed(self) -> None:
        """Check that all of the adapter was used and that all rows are of the base it was trained
        on; called after the last row and before the output is published.

        Raises:
            UserError: the adapter changes a weight that the base does not have, or belongs to
                another base.
        """
        self._check_base_hashes()
        if self.state != "base" and (left := self._merger.list_unused_tensors()):
            base = self.skeleton.index.path
            raise UserError(
                f"adapter {self.adapter_dir} adapts {left[0]}, which {base} does not have: it "
                "belongs to another base"
            )

    def _check_base_hashes(self) -> None:
        """Compare the hashes of the rows; rows that the format did not need are read now."""
        hashes = self._reader.hashes
        if hashes is None or self._record is None:
            return
        for weight in self.weights:
            known = hashes.sums.get(weight.name)
            if weight.name in self._record.tensors and not (known and known.is_complete):
                for span in self.iterate_spans(weight):
                    if weight.linear is not None and weight.linear.stored is not None:
                        weight.linear.stored.read_packed_rows(
                            self._choose_reader(weight), weight.span_in_linear(span)
                        )
                    elif weight.is_transposed and weight.linear is not None:
                        own = weight.span_in_linear(span)
                        weight.linear.read_packed_rows(self._choose_reader(weight), own)
                    elif weight.path not in self._new:
                        self._reader.read_rows(weight.name, span)
        found = {
            name: hashes.describe_tensor(name, known.total)
            for name, known in hashes.sums.items()
            if known.is_complete
        }
        owner, where = f"adapter {self.adapter_dir}", str(self.skeleton.index.path)
        self._record.check_tensors(found, where, owner, _GIVE_ITS_BASE)


@contextmanager
def open_merged_weights(
    base: BaseConfig,
    directory: Path,
    adapter_dir: Path,
    state: State,
    chunk_bytes: int = CHUNK_BYTES,
    *,
    keep_zeros: bool = False,
) -> Iterator[MergedWeights]:
    """Open the base's files in ``directory`` and the adapter, and yield the weights in ``state``.

    ``keep_zeros``: block weights that are 0 in the base's files stay 0. An adapter that was trained
    with ``adapter.keep_zeros`` has its own zeros kept in any case.

    Raises:
        UserError: damaged files, or an adapter that was trained on another base.
    """
    about = read_adapter_metadata(adapter_dir)
    skeleton = build_skeleton(base, directory, about.get("labels", ()))
    record = BaseRecord.from_metadata(about, adapter_dir / "dist_peft.json")
    record.check_sample(skeleton.index, f"adapter {adapter_dir}", _GIVE_ITS_BASE)
    if skeleton.prequantized is not None and state == "original":
        log.info(
            "%s is already quantized (%s): the adapter is merged into its dequantized weights",
            directory,
            skeleton.prequantized.format_label,
            extra=ONCE,
        )
    with ExitStack() as stack:
        # kept apart, an adapter of a tied embedding leaves the head as it was, as in training
        tied = skeleton.tied and state != "base"
        merger = open_merger(adapter_dir, _base_names(skeleton), stack, tied=tied)
        trained = about["tensors"] if contains_trained_weights(adapter_dir) else ()
        hashes = build_row_hashes(skeleton, trained) if record.is_complete else None
        reader = stack.enter_context(RowReader(skeleton.index, hashes))
        zeros: KeptZeros = "files" if keep_zeros else "none"
        if keeps_zeros_of_base(adapter_dir):
            zeros = "trained"
        yield MergedWeights(
            skeleton, merger, reader, adapter_dir, state, chunk_bytes, record, zeros, trained
        )


def _base_names(skeleton: Skeleton) -> dict[str, str]:
    """Return path of each weight in the model -> its name in the base's files."""
    names = {weight.path: weight.name for weight in list_base_weights(skeleton)}
    if skeleton.tied:  # some files also store the head's copy of the shared weight
        paths = {id(m): path for path, m in skeleton.model.named_modules()}
        embedding, head = (
            f"{paths[id(module)]}.weight"
            for module in (
                skeleton.model.get_input_embeddings(),
                skeleton.model.get_output_embeddings(),
            )
        )
        if head in names:
            names[head] = names[embedding]
    return names
