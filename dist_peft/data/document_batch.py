"""Token documents in a few flat arrays, as they are written and sent between processes."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Document", "DocumentBatch", "EncodedDocuments"]

Document = tuple[NDArray[np.int32], NDArray[np.uint8]]


@dataclass(frozen=True)
class EncodedDocuments:
    """Documents one after another.

    Attributes:
        tokens: int32 [T], of all documents. mask: uint8 [T], 1 where a token contributes to the
            loss; of labelled examples the token types. lengths: int64 [D], tokens of each.
    """

    tokens: NDArray[np.int32]
    mask: NDArray[np.uint8]
    lengths: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Document]:
        """Yield tokens int32 [T] and mask uint8 [T] of each document."""
        stop = 0
        for length in self.lengths.tolist():
            start, stop = stop, stop + length
            yield self.tokens[start:stop], self.mask[start:stop]


@dataclass(frozen=True)
class DocumentBatch:
    """Consecutive documents of one file.

    Attributes:
        file: name for messages. numbers: int64 [D], of the records in the file, from 1.
        classes: int64 [D], index of the label among the source's labels; -1: no label.
    """

    documents: EncodedDocuments
    file: str
    numbers: NDArray[np.int64]
    classes: NDArray[np.int64]
