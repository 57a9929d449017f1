"""Iterate over the weights of a run, tensor by tensor in row chunks, for every export.

A chunk is read from the base's files, converted to the requested state and handed on; nothing else
is in memory. The states of a linear weight of the blocks:

    original   rows of the files + adapter
    decoded    rows as training saw them, ``decode(encode(rows))``, + adapter
    codes      codes and scales of the integer base; the adapter is in the zeros (QA-LoRA, exact)
    base       the base as training saw it, without the adapter: an integer base's codes, scales
               and zeros, an NF4 base's packed rows

The packed rows of a prequantized base are those of its files. It has no full-precision rows, so
that ``original`` also means the dequantized rows.

The first two states return float32 rows, the others ``AffineParts`` with float32 zeros. All other
tensors (embeddings, norms, biases, the head) are rows of the files in every state; an adapter of
one of them is merged except in ``base``. Tensors of a classifier's head may be absent from the
files: the adapter stores them in full.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dist_peft.adapters.adapter_format import WeightMerger
from dist_peft.adapters.directory import read_metadata
from dist_peft.adapters.mergers import open_merger
from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.core.span import Span
from dist_peft.model.base_hashes import row_hashes
from dist_peft.model.experts import ExpertStack
from dist_peft.model.frozen_linear import FrozenLinear, FrozenRows, LinearRows
from dist_peft.model.skeleton import Skeleton, build_skeleton
from dist_peft.quant.affine import AffineCodec, AffineParts
from dist_peft.quant.codec import Codec
from dist_peft.quant.nf4 import Nf4Codec
from dist_peft.store.base_record import BaseRecord
from dist_peft.store.format import TensorSpec
from dist_peft.store.reader import RowReader

__all__ = ["CHUNK_BYTES", "State", "Walk", "Weight", "base_rows", "open_walk", "parts_to_rows"]

log = logging.getLogger("dist_peft")

State = Literal["original", "decoded", "codes", "base"]

_GIVE_ITS_BASE = "set base.path in the run's config.yaml to the one it was trained on"

CHUNK_BYTES = 64 * 2**20
"""Default size of a chunk of rows in float32."""


@dataclass(frozen=True)
class Weight:
    """A tensor of the base.

    Attributes:
        info: name, type and shape in the files, or those of its substitute (``Skeleton.tensors``).
        path: its name in the model, such as ``model.layers.0.self_attn.q_proj.weight``.
        linear: the linear that owns it as its weight, the head included, or the stack of experts
            that contains its rows; None for every other tensor.
        written: its name in the output: the name in the files, with the trunk's prefix added if
            the trunk was saved without its head.
        first: row of ``linear`` that corresponds to row 0 of the tensor.
        wide: output type of a tensor that must not be rounded to 16 bits; None: the format's type.
    """

    info: TensorSpec
    path: str
    linear: FrozenRows | None
    written: str
    first: int = 0
    wide: torch.dtype | None = None

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def in_block(self) -> bool:
        """Whether this is the weight of a block's linear, which formats may pack; not the head."""
        return self.linear is not None and not self.linear.is_head

    @property
    def codec(self) -> Codec | None:
        return None if self.linear is None else self.linear.codec

    @property
    def stem(self) -> str:
        """Name in the files without ``.weight``: the prefix of the names of packed tensors."""
        return self.info.name.removesuffix(".weight")

    @property
    def module(self) -> str:
        """Path of the module that owns the weight."""
        return self.path.rpartition(".")[0]

    @property
    def rows(self) -> int:
        return self.info.rows

    @property
    def columns(self) -> int:
        """Size of the last dimension: in_features of a matrix."""
        return self.info.shape[-1]

    def in_linear(self, span: Span) -> Span:
        """Map rows ``span`` to rows of ``linear``; a row of stacked experts is one expert."""
        height = torch.Size(self.info.shape[1:-1]).numel()
        return Span(self.first + span.start * height, self.first + span.stop * height)


class Walk:
    """Read the weights of a base with an adapter chunk by chunk; created by ``open_walk``.

    Args:
        state: state of the returned rows: original, decoded, codes or base.
        record: content of the base that the adapter was trained on; None if unknown.

    Attributes:
        weights: every tensor of the base, in the order of its files.

    Raises:
        UserError: the adapter lacks a parameter of the head, or a shape does not fit the base.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        merger: WeightMerger,
        reader: RowReader,
        adapter_dir: Path,
        state: State,
        chunk_bytes: int = CHUNK_BYTES,
        record: BaseRecord | None = None,
    ) -> None:
        self.skeleton, self.adapter_dir, self.state = skeleton, adapter_dir, state
        self._record = record
        self._merger, self._reader, self._chunk_bytes = merger, reader, chunk_bytes
        self.weights = _weights(skeleton)
        self._new = frozenset(skeleton.head.new if skeleton.head else ())
        if absent := sorted(name for name in self._new if not merger.touches(name)):
            raise UserError(
                f"adapter {adapter_dir} has no {absent[0]}, a parameter of the classifier's head "
                "that the base does not have either; does it belong to another run?"
            )

        merger.check_shapes(self._shapes())

    def _shapes(self) -> dict[str, tuple[int, int]]:
        """Map each path to rows and columns of its weight, which several tensors may share."""
        found: dict[str, tuple[int, int]] = {}
        for weight in self.weights:
            if weight.linear is None:
                columns = torch.Size(weight.info.shape[1:]).numel()
                found[weight.path] = (weight.rows, columns)
            else:
                stop = weight.in_linear(Span(0, weight.rows)).stop
                rows = max(stop, found.get(weight.path, (0, 0))[0])
                found[weight.path] = (rows, weight.columns)
        return found

    def adapts(self, weight: Weight) -> bool:
        """Return whether the adapter changes this tensor."""
        return self._merger.touches(weight.path)

    def packs(self, weight: Weight) -> bool:
        """Return whether a format may pack this weight: that of a block's linear, and in the
        states ``codes`` and ``base`` one with codes (a prequantized base can have others)."""
        if self.state not in ("codes", "base"):
            return weight.in_block
        kept = AffineCodec if self.state == "codes" else (AffineCodec, Nf4Codec)
        return weight.in_block and isinstance(weight.codec, kept)

    def spans(self, weight: Weight, multiple: int = 1) -> Iterator[Span]:
        """Yield row spans of at most ``chunk_bytes``; all but the last have a multiple of
        ``multiple`` rows, and at least that many."""
        row = 4 * max(1, torch.Size(weight.info.shape[1:]).numel())
        rows = max(1, self._chunk_bytes // row // multiple) * multiple
        yield from Span(0, weight.rows).chunks(rows)

    def rows(self, weight: Weight, span: Span) -> Tensor:
        """Return rows as numbers: float32 where the state changes them, else the file's type."""
        linear = weight.linear
        if self.state in ("codes", "base") and self._has_parts(weight):
            return parts_to_rows(self.parts(weight, span), weight.columns)
        adapted = self.adapts(weight) and self.state != "base"
        # includes the head: PiSSA subtracts its initial factors although it is not quantized
        as_trained = self.state in ("decoded", "base")
        decoded = linear is not None and (as_trained or linear.stored is not None)
        if decoded:
            assert linear is not None
            packed = self.packed_rows(weight, span)
            rows = linear.codec.decode(packed, linear.in_features, torch.float32)
            rows = rows.reshape(len(span), *weight.info.shape[1:])
        elif weight.path in self._new:
            rows = torch.zeros(len(span), *weight.info.shape[1:])  # the adapter has all of it
        else:
            rows = self._reader.read(weight.name, span)
        if not adapted:
            return rows
        rows = rows.float()
        into: Literal["original", "decoded"] = "decoded" if decoded else "original"
        if linear is None:
            return self._merger.merge_rows(weight.path, rows, span, into)
        flat = rows.reshape(-1, weight.columns)
        merged = self._merger.merge_rows(weight.path, flat, weight.in_linear(span), into)
        return merged.view(rows.shape)

    def parts(self, weight: Weight, span: Span) -> AffineParts:
        """Return codes, scales and float32 zeros of a linear's rows on an integer base."""
        assert weight.linear is not None and isinstance(weight.linear.codec, AffineCodec)
        parts = weight.linear.codec.split(self.packed_rows(weight, span), weight.columns)
        parts = parts._replace(zero=parts.zero.float())
        if self.state == "codes" and self.adapts(weight):
            return self._merger.merge_parts(weight.path, parts, span)
        return parts

    def _has_parts(self, weight: Weight) -> bool:
        return weight.in_block and isinstance(weight.codec, AffineCodec)

    def packed_rows(self, weight: Weight, span: Span) -> Tensor:
        """Return a linear's packed rows as in training, ``uint8 [rows, row_bytes]``; with PiSSA
        and LoftQ those of the residual, without the product of the initial factors."""
        assert weight.linear is not None
        own = weight.in_linear(span)
        read = LinearRows.read(weight.linear, self._reader, own)
        return read.packed(partial(self._merger.residual_rows, weight.path, span=own))

    def group_changes(self) -> Iterator[tuple[AffineParts, Tensor]]:
        """Yield affine parts and the change of each group by an adapter that fits into zeros, in
        the state ``base`` (``adapters.qalora.merge``)."""
        for weight in self.weights:
            if self._has_parts(weight) and self.adapts(weight):
                for span in self.spans(weight):
                    parts = self.parts(weight, span)
                    yield parts, self._merger.group_change(weight.path, parts, span)

    def check_complete(self) -> None:
        """Check that all of the adapter was used and that all rows are of the base it was trained
        on; called after the last row and before the output is published.

        Raises:
            UserError: the adapter changes a weight that the base does not have, or belongs to
                another base.
        """
        self._check_base()
        if self.state != "base" and (left := self._merger.unused()):
            base = self.skeleton.index.path
            raise UserError(
                f"adapter {self.adapter_dir} adapts {left[0]}, which {base} does not have: it "
                "belongs to another base"
            )

    def _check_base(self) -> None:
        """Compare the hashes of the rows; rows that the format did not need are read now."""
        hashes = self._reader.hashes
        if hashes is None or self._record is None:
            return
        for weight in self.weights:
            known = hashes.sums.get(weight.name)
            if weight.name in self._record.tensors and not (known and known.is_whole):
                for span in self.spans(weight):
                    if weight.linear is not None and weight.linear.stored is not None:
                        weight.linear.stored.read(self._reader, weight.in_linear(span))
                    elif weight.path not in self._new:
                        self._reader.read(weight.name, span)
        found = {
            name: hashes.describe(name, known.total)
            for name, known in hashes.sums.items()
            if known.is_whole
        }
        owner, where = f"adapter {self.adapter_dir}", str(self.skeleton.index.path)
        self._record.check_tensors(found, where, owner, _GIVE_ITS_BASE)


@contextmanager
def open_walk(
    base: BaseConfig,
    directory: Path,
    adapter_dir: Path,
    state: State,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[Walk]:
    """Open the base's files in ``directory`` and the adapter, and yield the weights in ``state``.

    Raises:
        UserError: damaged files, or an adapter that was trained on another base.
    """
    about = read_metadata(adapter_dir)
    skeleton = build_skeleton(base, directory, about.get("labels", ()))
    record = BaseRecord.from_metadata(about, adapter_dir / "dist_peft.json")
    record.check_sample(skeleton.index, f"adapter {adapter_dir}", _GIVE_ITS_BASE)
    if skeleton.prequantized is not None and state == "original":
        log.info(
            "%s is already quantized (%s): the adapter is merged into its dequantized weights",
            directory,
            skeleton.prequantized.label,
            extra=ONCE,
        )
    with ExitStack() as stack:
        # kept apart, an adapter of a tied embedding leaves the head as it was, as in training
        tied = skeleton.tied and state != "base"
        merger = open_merger(adapter_dir, _base_names(skeleton), stack, tied=tied)
        hashes = row_hashes(skeleton) if record.is_complete else None
        reader = stack.enter_context(RowReader(skeleton.index, hashes))
        yield Walk(skeleton, merger, reader, adapter_dir, state, chunk_bytes, record)


def base_rows(
    base: BaseConfig, directory: Path, labels: Sequence[str], chunk_bytes: int = CHUNK_BYTES
) -> Iterator[tuple[str, Tensor, Span]]:
    """Yield path, rows and row span of every tensor of the base as training saw it, without any
    adapter. Rows of experts that are stored together are matrices."""
    skeleton = build_skeleton(base, directory, labels)
    with RowReader(skeleton.index) as reader:
        for weight in _weights(skeleton):
            size = torch.Size(weight.info.shape[1:]).numel()
            if skeleton.head is not None and weight.path in skeleton.head.new:
                continue
            for span in Span(0, weight.rows).chunks(max(1, chunk_bytes // 4 // max(1, size))):
                if weight.linear is None:
                    yield weight.path, reader.read(weight.name, span), span
                    continue
                own = weight.in_linear(span)
                packed = LinearRows.read(weight.linear, reader, own).packed(lambda rows: rows)
                columns = weight.linear.in_features
                yield weight.path, weight.linear.codec.decode(packed, columns, torch.float32), own


def _base_names(skeleton: Skeleton) -> dict[str, str]:
    """Return path of each weight in the model -> its name in the base's files."""
    names = {weight.path: weight.name for weight in _weights(skeleton)}
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


def parts_to_rows(parts: AffineParts, columns: int) -> Tensor:
    """Dequantize ``(code - zero) * scale`` to float32 ``[rows, columns]``."""
    rows, groups = parts.scale.shape
    codes = parts.codes.view(rows, groups, -1).float()
    numbers = (codes - parts.zero.float().unsqueeze(-1)) * parts.scale.float().unsqueeze(-1)
    return numbers.flatten(1)[:, :columns]


def _weights(skeleton: Skeleton) -> list[Weight]:
    paths: dict[str, tuple[str, FrozenRows | None]] = {}
    first: dict[str, int] = {}
    for path, module in skeleton.model.named_modules():
        for own, name in module.checkpoint_names.items():
            is_linear = isinstance(module, FrozenLinear) and own == "packed"
            linear = module if is_linear else None
            paths[name] = (f"{path}.{'weight' if is_linear else own}", linear)
        if isinstance(module, ExpertStack):
            for piece in module.pieces:
                paths[piece.name] = (f"{path}.weight", module)
                first[piece.name] = piece.span.start
    trunk = "" if skeleton.head is None else f"{skeleton.model.base_model_prefix}."
    found = []
    for name, info in skeleton.tensors.items():
        path, linear = paths.get(name, (name, None))
        headless = path.startswith(trunk) and not name.startswith(trunk)
        written = skeleton.renamed.get(name, f"{trunk}{name}" if headless else name)
        wide = skeleton.wide.get(name)
        found.append(Weight(info, path, linear, written, first.get(name, 0), wide))
    return found
