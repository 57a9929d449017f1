"""Find the end-of-turn tokens that a model was trained on, from the training sequences.

A chat template may end a turn with a token other than the tokenizer's eos, and the base's
generation config may stop at a third: then the model ends its turn and keeps generating.
"""

from collections import Counter
from collections.abc import Collection
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["find_turn_end_ids"]

_ROWS = 64
_TAIL = 3
"""Number of targets examined at the end of a document: a newline may follow the token."""
_SHARE = 0.1


class IndexedSequences(Protocol):
    """Sequences as tokens, labels (-100: no target) and positions (0 starts a document)."""

    def __len__(self) -> int: ...

    def get_sequence(self, index: int) -> tuple[Tensor, Tensor, Tensor]: ...


def find_turn_end_ids(rows: IndexedSequences, special: Collection[int]) -> list[int]:
    """Return the special tokens among the last targets of at least a tenth of the documents.

    Args:
        rows: the training data; up to 64 sequences, evenly spread, are examined.
        special: ids of control tokens: special and added tokens, the eos.

    Returns:
        The ids, the most frequent first; empty where documents end with plain text.
    """
    ends, documents = Counter[int](), 0
    for index in torch.linspace(0, len(rows) - 1, min(_ROWS, len(rows))).long().unique().tolist():
        _, labels, positions = rows.get_sequence(index)
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(labels)]
        for first, stop in pairwise(starts):
            own = labels[first:stop]
            targets = own[own != -100].tolist()
            documents += bool(targets)
            last = next((t for t in reversed(targets[-_TAIL:]) if t in special), None)
            if last is not None:
                ends[last] += 1
    return [token for token, count in ends.most_common() if count >= _SHARE * documents]
