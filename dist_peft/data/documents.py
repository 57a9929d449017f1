"""Build sequences from token documents: truncate or drop long ones, pack the rest.

A sequence is one item of a data set: with packing several documents of together at most
``seq_len`` tokens, without it one document (or one chunk of a plain text). They are numbered from
the documents alone, equally on every rank; memory holds a few integers per document.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from dist_peft.core.config.run import DataConfig, DataSource
from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.data.cache import TokenDocuments, combine_sources
from dist_peft.data.files import RecordPlace
from dist_peft.data.held_out_split import count_side_variants, load_split_documents
from dist_peft.data.loader import SingleTask
from dist_peft.data.order import Ranges, describe_epochs
from dist_peft.data.packing import concatenate_documents
from dist_peft.data.pieces import (
    PIECE_BLOCK,
    DocumentPieces,
    arrange_pieces,
    concatenate_pieces,
    count_piece_targets,
    split_by_epoch,
    split_into_windows,
    take_whole_documents,
)
from dist_peft.data.tokens import Tokenizer

__all__ = [
    "SequenceSet",
    "fit_documents",
    "load_sequence_set",
    "load_sequence_sets",
    "refuse_empty_set",
]

_LOG = logging.getLogger("dist_peft")

Ints = NDArray[np.int64]


class SequenceSet(SingleTask):
    """The sequences of a data set.

    Attributes:
        packed: sequences hold several documents (to be padded to ``seq_len``).
        seq_len: maximum number of tokens of a sequence.
        fingerprint: sha256 of all sequences' contents and order; equal exactly when numbers mean
            the same sequences. Resuming, and ranks that read their own copies, rely on that.

    Args:
        epochs: pieces of each epoch, in turn; one without variants of records.
    """

    def __init__(
        self,
        documents: Sequence[TokenDocuments],
        epochs: Sequence[DocumentPieces],
        *,
        seq_len: int,
        packed: bool,
    ) -> None:
        self.packed = packed
        self.seq_len = seq_len
        self._documents = documents
        built = [
            arrange_pieces(documents, pieces, seq_len if packed else None) for pieces in epochs
        ]
        self._pieces = concatenate_pieces([pieces for pieces, _, _ in built])
        per_piece = np.concatenate([counts for _, counts, _ in built])
        sizes = [len(bounds) - 1 for _, _, bounds in built]
        self._epoch_ends = np.cumsum(sizes).tolist()
        self._bounds = built[0][2]
        for _, _, bounds in built[1:]:
            self._bounds = np.concatenate([self._bounds, self._bounds[-1] + bounds[1:]])
        del built
        self._targets = np.add.reduceat(per_piece, self._bounds[:-1], dtype=np.int64)
        self._lengths = np.add.reduceat(self._pieces.length, self._bounds[:-1], dtype=np.int64)
        self.fingerprint = self._compute_digest()

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @property
    def epoch_ranges(self) -> list[Ranges]:
        return [[each] for each in pairwise([0, *self._epoch_ends])]

    def num_targets(self, index: int) -> int:
        """Return the number of tokens of sequence ``index`` in the loss; at least 1."""
        return int(self._targets[index])

    def num_tokens(self, index: int) -> int:
        """Return the number of tokens of sequence ``index``, without padding."""
        return int(self._lengths[index])

    @property
    def total_targets(self) -> int:
        return int(self._targets.sum())

    @property
    def total_tokens(self) -> int:
        return int(self._lengths.sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest document: number of positions the model must support."""
        return int(self._pieces.length.max())

    @property
    def largest_token(self) -> int:
        return max(d.largest_token for d in self._documents)

    @property
    def chat_template(self) -> str | None:
        """This project's template, if conversations were rendered with it."""
        return next((d.chat_template for d in self._documents if d.chat_template), None)

    @property
    def has_conversations(self) -> bool | None:
        """Whether a source has conversations; None: unknown."""
        return combine_sources(d.has_conversations for d in self._documents)

    @property
    def num_documents(self) -> int:
        """Number of documents and chunks of plain text, over all sequences."""
        return len(self._pieces)

    def get_sequence(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return tokens, labels, positions of a sequence: LongTensors [T], T <= seq_len, unpadded.

        ``labels[t]`` is the token to predict at ``t`` (the next one), or -100; positions restart
        at 0 with each document.

        Raises:
            IndexError: no such sequence.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        parts = []
        for piece in range(self._bounds[index], self._bounds[index + 1]):
            documents = self._documents[self._pieces.source[piece]]
            start = int(self._pieces.start[piece])
            span = slice(start, start + int(self._pieces.length[piece]))
            parts.append((documents.tokens[span], documents.mask[span]))
        tokens, labels, positions = (torch.from_numpy(a) for a in concatenate_documents(parts))
        return tokens, labels, positions

    def list_records(self, index: int) -> list[tuple[int, RecordPlace]]:
        """Return the number of the source and the place of each record in sequence ``index``."""
        inside = slice(self._bounds[index], self._bounds[index + 1])
        numbers, starts = self._pieces.source[inside].tolist(), self._pieces.start[inside].tolist()
        return [(n, self._documents[n].find_place(s)) for n, s in zip(numbers, starts, strict=True)]

    def _compute_digest(self) -> str:
        digest = hashlib.sha256("".join(d.digest for d in self._documents).encode())
        for array in (self._bounds, self._pieces.source, self._pieces.start, self._pieces.length):
            for block in range(0, len(array), PIECE_BLOCK):
                digest.update(array[block : block + PIECE_BLOCK].astype(np.int64).data)
        return digest.hexdigest()


def load_sequence_set(
    config: DataConfig, sources: list[DataSource], tokenizer: Tokenizer, *, name: str
) -> SequenceSet:
    """Return the sequences of ``sources``, in their order, tokenized or from the cache.

    Args:
        config: sequence length, packing, loss, split and cache; its ``train`` and ``eval`` are
            ignored.
        sources: at least one.
        tokenizer: of the base.
        name: ``train`` or ``eval``, for messages; with ``val_split`` the side of the split.

    Raises:
        UserError: unreadable or invalid data (see ``files``, ``sources``, ``chat``), a record that
            is too long with ``too_long: error``, no record with a target token, no sequence left.
    """
    if not sources:
        raise UserError(f"data.{name} names no source")
    loaded = _load_sources(config, sources, tokenizer, name)
    kind = np.min_scalar_type(len(loaded))
    numbers = np.repeat(np.arange(len(loaded), dtype=kind), [len(fit) for _, fit in loaded])
    joined = replace(concatenate_pieces([fit for _, fit in loaded]), source=numbers)
    variants = count_side_variants(config, sources, name)
    return _make_sequence_set(
        config, variants, [documents for documents, _ in loaded], joined, f"data.{name}"
    )


def load_sequence_sets(
    config: DataConfig, sources: list[DataSource], tokenizer: Tokenizer, *, name: str
) -> list[SequenceSet]:
    """Like ``load_sequence_set``, but return a separate set for each source."""
    loaded = _load_sources(config, sources, tokenizer, name)
    variants = count_side_variants(config, sources, name)
    return [
        _make_sequence_set(config, [count], [documents], fit, f"data.{name}[{number}]")
        for number, (count, (documents, fit)) in enumerate(zip(variants, loaded, strict=True))
    ]


def _load_sources(
    config: DataConfig, sources: list[DataSource], tokenizer: Tokenizer, name: str
) -> list[tuple[TokenDocuments, DocumentPieces]]:
    """Return the documents of each source, and the pieces of those that are used."""
    loaded, masks = load_split_documents(config, sources, tokenizer, name)
    found = []
    for number, (documents, mask) in enumerate(zip(loaded, masks, strict=True)):
        key = f"data.{name}[{number}]"
        kept = _exclude_untrainable(documents, config, key, mask)
        found.append((documents, fit_documents(documents, config, key, kept)))
    return found


def _make_sequence_set(
    config: DataConfig,
    variants: list[int],
    documents: list[TokenDocuments],
    pieces: DocumentPieces,
    name: str,
) -> SequenceSet:
    epochs = split_by_epoch(documents, pieces, variants)
    for each in epochs:
        refuse_empty_set(config, each, name)
    rows = SequenceSet(documents, epochs, seq_len=config.seq_len, packed=config.packing)
    _LOG.info(
        "%s: %d documents in %d sequences%s, %d tokens (%d in the loss), packing efficiency "
        "%.1f %%",
        name,
        rows.num_documents,
        len(rows),
        describe_epochs(rows.epoch_ranges),
        rows.total_tokens,
        rows.total_targets,
        100 * rows.total_tokens / (len(rows) * config.seq_len),
    )
    return rows


def refuse_empty_set(config: DataConfig, pieces: DocumentPieces, name: str) -> None:
    """Check that ``pieces`` of the source called ``name`` is not empty.

    Raises:
        UserError: it is empty.
    """
    if not len(pieces):
        raise UserError(
            f"{name}: no record is left (data.too_long is {config.too_long}); "
            f"raise data.seq_len (now {config.seq_len})"
        )


def _exclude_untrainable(
    documents: TokenDocuments, config: DataConfig, key: str, side: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Return the mask [D] of the documents of ``side`` with a token in the loss; log the number of
    others.

    Raises:
        UserError: no document has one.
    """
    targets = count_piece_targets([documents], take_whole_documents(documents))
    empty = np.flatnonzero((targets == 0) & side)
    if not len(empty):
        return side
    why = (
        "it is empty"
        if documents.is_text or config.loss_on == "all"
        else "a conversation needs an assistant turn; or set data.loss_on: all"
    )
    first = documents.get_place(int(empty[0]))
    if len(empty) == side.sum():
        raise UserError(
            f"{first} has no token that contributes to the loss, nor has any other of {key}: "
            f"{why}; remove or fix the records"
        )
    _LOG.warning(
        "%s: left out %d of %d records without a token that contributes to the loss; the first is "
        "%s: %s",
        key,
        len(empty),
        int(side.sum()),
        first,
        why,
        extra=ONCE,
    )
    return (targets > 0) & side


def fit_documents(
    documents: TokenDocuments, config: DataConfig, key: str, kept: NDArray[np.bool_] | None = None
) -> DocumentPieces:
    """Split documents into pieces of at most ``seq_len`` tokens, each with a target token.

    Args:
        kept: mask [D] of the documents to use; None: all.

    Raises:
        UserError: a document is too long, and ``too_long`` neither truncates nor drops it.
    """
    pieces = (
        take_whole_documents(documents)
        if kept is None or kept.all()
        else take_whole_documents(documents).select_pieces(kept)
    )
    if documents.is_text:
        windows = split_into_windows(pieces, config.seq_len)
        # a last chunk of one token has no target
        return windows.select_pieces(windows.length > 1)
    long = np.flatnonzero(pieces.length > config.seq_len)
    if not len(long):
        return pieces
    if config.too_long == "drop":
        _LOG.warning(
            "%s: dropped %d of %d records longer than data.seq_len %d",
            key,
            len(long),
            len(pieces),
            config.seq_len,
            extra=ONCE,
        )
        return pieces.select_pieces(pieces.length <= config.seq_len)
    if config.too_long == "truncate":
        return _truncate_pieces(documents, pieces, config.seq_len, key)
    numbers = np.flatnonzero(kept) if kept is not None else np.arange(len(documents))
    place = documents.get_place(int(numbers[long[0]]))
    raise UserError(_make_too_long_message(place, pieces, long, config))


def _make_too_long_message(
    place: RecordPlace, pieces: DocumentPieces, long: Ints, config: DataConfig
) -> str:
    more = f" ({len(long)} records are too long)" if len(long) > 1 else ""
    refused = "data.too_long: split is for plain text only. " if config.too_long == "split" else ""
    return (
        f"{place} has {pieces.length[long[0]]} tokens, more than "
        f"data.seq_len {config.seq_len}{more}. {refused}Raise data.seq_len (the longest has "
        f"{pieces.length.max()}), or set data.too_long to truncate or drop"
    )


def _truncate_pieces(
    documents: TokenDocuments, pieces: DocumentPieces, size: int, key: str
) -> DocumentPieces:
    cut = DocumentPieces(pieces.source, pieces.start, np.minimum(pieces.length, size))
    kept = count_piece_targets([documents], cut) > 0
    _LOG.warning(
        "%s: cut %d of %d records to data.seq_len %d tokens",
        key,
        int((pieces.length > size).sum()),
        len(pieces),
        size,
        extra=ONCE,
    )
    if not kept.all():
        _LOG.warning(
            "%s: dropped %d of these, as no token that contributes to the loss was left",
            key,
            int((~kept).sum()),
            extra=ONCE,
        )
    return cut.select_pieces(kept)
