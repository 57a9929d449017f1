"""Hold out a part of the records of the training sources (``data.val_split``).

Which records are held out depends on the records of the sources alone: not on ranks, seed,
``seq_len`` or packing, and on the tokenizer only where it makes different texts equal. ::

    key of a record     a mix of the number of its file and its number in the file
    equal records       share the smallest of their keys, over all sources: one group
    held out            of each source the groups of the smallest keys, up to its part

A group is on one side as a whole, in all sources, so that no record is trained on that is also
held out. The key does not name the source: aligned files (translations in both directions) are
split at the same records. Variants of a record (``data.augmenting``) are on its side; held out is
the record as it is.
"""

import logging
from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from dist_peft.core.config.run import DataConfig, DataSource
from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.data.cache import TokenDocuments
from dist_peft.data.tokens import Tokenizer, load_token_documents

__all__ = [
    "count_held_out",
    "count_side_variants",
    "load_split_documents",
    "select_split_side",
]

_LOG = logging.getLogger("dist_peft")

Bools = NDArray[np.bool_]
Words = NDArray[np.uint64]


def load_split_documents(
    config: DataConfig, sources: Sequence[DataSource], tokenizer: Tokenizer, name: str
) -> tuple[list[TokenDocuments], list[Bools]]:
    """Return the documents of each source, and the mask [D] of those that ``name`` reads: all, or
    with ``val_split`` one side of the split.

    Args:
        name: ``train`` or ``eval``.

    Raises:
        UserError: unreadable or invalid data; or too few records to split.
    """
    is_second = bool(config.val_split) and name == "eval"  # of the same documents
    documents = [
        load_token_documents(
            config,
            source,
            tokenizer,
            f"data.{'train' if is_second else name}[{number}]",
            logs_notes=not is_second,
        )
        for number, source in enumerate(sources)
    ]
    if config.val_split:
        return documents, select_split_side(documents, config.val_split, name)
    return documents, [np.ones(len(each), np.bool_) for each in documents]


def count_side_variants(config: DataConfig, sources: Sequence[DataSource], name: str) -> list[int]:
    """Return the number of documents of a record of each source on the side ``name``."""
    is_held_out = bool(config.val_split) and name == "eval"
    return [1 if is_held_out else source.num_variants for source in sources]


def select_split_side(
    documents: Sequence[TokenDocuments], val_split: float, name: str
) -> list[Bools]:
    """Return, for each source, the mask [D] of the documents of one side of the split.

    Args:
        documents: of all training sources.
        val_split: a share below 1, else a number of records, of each source.
        name: ``train``, or ``eval`` for the held-out side.

    Raises:
        UserError: a source has too few different records.
    """
    records = [_find_records(each) for each in documents]
    groups, keys = _group_equal_records(documents, [first for first, _ in records])
    held = np.zeros(int(max(map(np.max, groups))) + 1, np.bool_)
    for number, (own_groups, own_keys) in enumerate(zip(groups, keys, strict=True)):
        count = count_held_out(len(own_groups), val_split, f"data.train[{number}]")
        chosen = _choose_groups(own_groups, own_keys, count)
        if not len(chosen):
            raise UserError(
                f"data.val_split: no record of data.train[{number}] can be held out, since equal "
                "ones are kept on one side and none occurs seldom enough; remove the repeated "
                "records, or name held-out files in data.eval"
            )
        held[chosen] = True
    sides = []
    for number, (own_groups, (first, record)) in enumerate(zip(groups, records, strict=True)):
        is_held = held[own_groups]
        if is_held.all():
            raise UserError(
                f"data.val_split: every record of data.train[{number}] equals one that is held "
                "out; remove the repeated source, or name held-out files in data.eval"
            )
        if name == "train":
            _LOG.info(
                "data.val_split: %d of %d records of data.train[%d] are held out",
                int(is_held.sum()),
                len(is_held),
                number,
                extra=ONCE,
            )
            sides.append(~is_held[record])
        else:
            side = np.zeros(len(record), np.bool_)
            side[first] = is_held
            sides.append(side)
    return sides


def count_held_out(records: int, val_split: float, key: str) -> int:
    """Return the number of records to hold out of ``records``; at least one stays on each side.

    Args:
        key: of the source, such as ``data.train[0]``.

    Raises:
        UserError: there are not that many.
    """
    count = max(1, round(records * val_split)) if val_split < 1 else int(val_split)
    if count < records:
        return count
    raise UserError(
        f"data.val_split {val_split:g} would hold out {count} of the {records} records of {key} "
        "(a .txt file is one); lower it, or name held-out files in data.eval"
    )


def _find_records(documents: TokenDocuments) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first document of each record [R], and the record of each document [D]."""
    places = documents.places
    begins = np.ones(len(documents), np.bool_)
    begins[1:] = (places[1:] != places[:-1]).any(1)  # variants of a record are neighbours
    return np.flatnonzero(begins), np.cumsum(begins) - 1


def _group_equal_records(
    documents: Sequence[TokenDocuments], first: Sequence[NDArray[np.int64]]
) -> tuple[list[NDArray[np.int64]], list[Words]]:
    """Return, for each source, the group and the group's key of each of its records [R]."""
    digests = np.concatenate([_hash_contents(d, f) for d, f in zip(documents, first, strict=True)])
    keys = np.concatenate([_mix_places(d.places[f]) for d, f in zip(documents, first, strict=True)])
    _, groups = np.unique(digests, return_inverse=True)
    smallest = np.full(int(groups.max()) + 1, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(smallest, groups, keys)
    bounds = np.cumsum([len(f) for f in first])[:-1]
    return np.split(groups, bounds), np.split(smallest[groups], bounds)


def _hash_contents(documents: TokenDocuments, numbers: NDArray[np.int64]) -> Words:
    """Return the xxh3 of tokens, loss mask and label of each document of ``numbers``."""
    found = np.empty(len(numbers), np.uint64)
    tokens, mask = np.asarray(documents.tokens), np.asarray(documents.mask)
    labels = documents.classes if len(documents.classes) else np.full(len(documents), -1)
    for index, number in enumerate(numbers.tolist()):
        span = slice(*documents.offsets[number : number + 2].tolist())
        digest = xxhash.xxh3_64(tokens[span].data)
        digest.update(mask[span].data)
        digest.update(int(labels[number]).to_bytes(8, "little", signed=True))
        found[index] = digest.intdigest()
    return found


def _mix_places(places: NDArray[np.int64]) -> Words:
    """Return a key of each place [R, 2] (number of the file, of the record in it): SplitMix64."""
    mixed = _mix_bits(places[:, 0].astype(np.uint64))
    return _mix_bits(mixed ^ places[:, 1].astype(np.uint64))


def _mix_bits(values: Words) -> Words:
    """Return the finalizer of SplitMix64 (Steele et al., 2014), a bijection of 64-bit words."""
    mixed: Words = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _choose_groups(groups: NDArray[np.int64], keys: Words, count: int) -> NDArray[np.int64]:
    """Return the groups of the smallest keys that have together at most ``count`` records.

    A group that is too large for the rest is passed over.
    """
    sizes = np.bincount(groups)
    chosen: list[int] = []
    order = groups[np.lexsort((groups, keys))]
    for group in order[np.sort(np.unique(order, return_index=True)[1])].tolist():
        if count == 0:
            break
        if sizes[group] <= count:
            chosen.append(group)
            count -= int(sizes[group])
    return np.array(chosen, np.int64)
