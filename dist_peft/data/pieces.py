"""Pieces of documents: which tokens of which source go into a sequence together.

A record of 50 tokens costs an index of 14 bytes here: the number of its source (1 byte), the offset
of its first token (8; 0 as long as it is the offsets file itself) and its length (4). Whatever is
computed about pieces is computed in blocks, so that a million records need no temporary arrays of a
million values.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_peft.data.cache import TokenDocuments
from dist_peft.data.packing import pack_documents

__all__ = [
    "PIECE_BLOCK",
    "DocumentPieces",
    "arrange_pieces",
    "concatenate_pieces",
    "count_piece_targets",
    "split_by_epoch",
    "split_into_windows",
    "take_whole_documents",
]

PIECE_BLOCK = 2**16
"""Pieces that are counted and hashed at a time."""

_TOKEN_BLOCK = 2**19
"""Tokens whose mask is summed at a time."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class DocumentPieces:
    """Parts of documents, each isolated in its sequence: three arrays of integers [P]."""

    source: NDArray[np.integer[Any]]
    start: Ints  # offset in the tokens of the source
    length: NDArray[np.integer[Any]]

    def __len__(self) -> int:
        return len(self.start)

    def select_pieces(self, which: NDArray[np.bool_] | Ints | slice) -> "DocumentPieces":
        return DocumentPieces(self.source[which], self.start[which], self.length[which])


def take_whole_documents(documents: TokenDocuments) -> DocumentPieces:
    """Return one piece for each document of a source, which is numbered 0."""
    # int32 is half of the memory; one document may be a whole book shelf
    lengths: NDArray[np.integer[Any]] = np.empty(
        len(documents), np.int32 if documents.offsets[-1] < 2**31 else np.int64
    )
    np.subtract(documents.offsets[1:], documents.offsets[:-1], out=lengths, casting="unsafe")
    return DocumentPieces(np.zeros(len(documents), np.uint8), documents.offsets[:-1], lengths)


def split_into_windows(pieces: DocumentPieces, size: int) -> DocumentPieces:
    """Split pieces into consecutive chunks of ``size`` tokens; the last is the remainder."""
    counts = -(-pieces.length // size)
    first = np.cumsum(counts) - counts
    within = (np.arange(counts.sum()) - np.repeat(first, counts)) * size
    return DocumentPieces(
        np.repeat(pieces.source, counts),
        np.repeat(pieces.start, counts) + within,
        np.minimum(size, np.repeat(pieces.length, counts) - within),
    )


def split_by_epoch(
    documents: Sequence[TokenDocuments], pieces: DocumentPieces, variants: Sequence[int]
) -> list[DocumentPieces]:
    """Return the pieces of each epoch, of which there are as many as variants of a record.

    Epoch ``k`` has variant ``k % variants`` of each record.

    Args:
        variants: by source, the number of documents of each record, which are consecutive.
    """
    epochs = max(variants)
    if epochs == 1:
        return [pieces]
    chosen = np.zeros((epochs, len(pieces)), np.bool_)
    for source, (own, count) in enumerate(zip(documents, variants, strict=True)):
        mine = np.flatnonzero(pieces.source == source)
        number = np.searchsorted(own.offsets, pieces.start[mine], side="right") - 1
        for epoch in range(epochs):
            chosen[epoch, mine] = number % count == epoch % count
    return [pieces.select_pieces(which) for which in chosen]


def arrange_pieces(
    documents: Sequence[TokenDocuments], pieces: DocumentPieces, capacity: int | None
) -> tuple[DocumentPieces, NDArray[np.int32], Ints]:
    """Return pieces in the order of their sequences, their target tokens, and the bounds [S + 1] of
    sequences of at most ``capacity`` tokens; None: each piece is a sequence."""
    # in the order of the documents, in which they are neighbours on disk
    per_piece = count_piece_targets(documents, pieces)
    if capacity is None:
        return pieces, per_piece, np.arange(len(pieces) + 1)
    order, bounds = pack_documents(pieces.length, capacity)
    return pieces.select_pieces(order), per_piece[order], bounds


def concatenate_pieces(parts: list[DocumentPieces]) -> DocumentPieces:
    return DocumentPieces(
        *(
            _concatenate_arrays([getattr(p, f) for p in parts])
            for f in ("source", "start", "length")
        )
    )


def _concatenate_arrays(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def count_piece_targets(
    documents: Sequence[TokenDocuments], pieces: DocumentPieces
) -> NDArray[np.int32]:
    """Return the number of target tokens of each piece [P]; its first token is never predicted."""
    counts = np.zeros(len(pieces), dtype=np.int32)
    bounds = _split_into_blocks(pieces.length)
    for start, stop in itertools.pairwise(bounds):
        part = pieces.select_pieces(slice(start, stop))
        for number, source in enumerate(documents):
            mine = np.flatnonzero((part.source == number) & (part.length > 1))
            if len(mine):
                mask_sums = _sum_mask(source.mask, part.start[mine] + 1, part.length[mine] - 1)
                counts[start + mine] = mask_sums
    return counts


def _split_into_blocks(lengths: NDArray[np.integer[Any]]) -> list[int]:
    """Return bounds of consecutive pieces that have together about ``_TOKEN_BLOCK`` tokens."""
    ends = np.cumsum(lengths, dtype=np.int64)
    steps = np.arange(0, int(ends[-1]) if len(ends) else 0, _TOKEN_BLOCK)
    return np.unique([*np.searchsorted(ends, steps), len(ends)]).tolist()


def _sum_mask(mask: NDArray[np.uint8], start: Ints, length: NDArray[np.integer[Any]]) -> Ints:
    """Return the sums [P] of the mask over ``start[p]`` to ``start[p] + length[p]``."""
    # reduceat over alternating bounds: even entries are the sums over [start, stop); a bound at
    # the very end of the array is neither allowed nor needed
    order = np.argsort(start, kind="stable")
    bounds = np.stack([start[order], start[order] + length[order]], axis=1).ravel()
    sums = np.empty(len(start), np.int64)
    # only the part to be summed: numpy makes an int64 copy of its whole argument
    inside = mask[bounds[0] : bounds[-1]]
    sums[order] = np.add.reduceat(inside, bounds[:-1] - bounds[0], dtype=np.int64)[::2]
    return sums
