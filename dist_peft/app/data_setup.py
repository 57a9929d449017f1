"""Build the data loaders of a run from the ``data`` section."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from dist_peft.core.agreement import digest_of
from dist_peft.core.config.run import DataConfig, DataSource, RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.core.world import World
from dist_peft.data.classification import LabelledLoader, LabelledRows, load_labelled
from dist_peft.data.documents import RowSet, load_row_sets, load_rows
from dist_peft.data.loader import Loader, Rows
from dist_peft.data.mixture import Mixture
from dist_peft.data.multiple_choice import ChoiceRows, Question
from dist_peft.data.order import MixedOrder, Order, shares_of
from dist_peft.data.tokenizer_digest import template_digest, tokenizer_digest
from dist_peft.model.classifier import pad_token
from dist_peft.model.hub import Tokenizer
from dist_peft.model.skeleton import Skeleton

__all__ = ["Loaders", "check_fit", "check_tokens", "choice_loader", "make_loaders", "read_rows"]

log = logging.getLogger("dist_peft")

PROBE_TOKENS = 64
PROBE_ROWS = 8

AnyRows = RowSet | LabelledRows | Mixture

T = TypeVar("T")


@dataclass
class Loaders:
    """Loaders of training and held-out data, and probe tokens whose logits are compared.

    Attributes:
        chat_template: the default template, where the training conversations were rendered with it.
        inputs: fingerprints of all inputs, by key, for comparisons (``app.run_identity``).
    """

    train: Loader
    eval: Loader | None
    probe: Tensor
    chat_template: str | None
    inputs: dict[str, str | None]


def make_loaders(config: RunConfig, tokenizer: Tokenizer, world: World) -> Loaders:
    """Tokenize (once per node, other ranks read the cache) and build this rank's loaders.

    Raises:
        UserError: on every rank: unreadable, empty or unfit data, or more ranks than rows.
    """
    # fail fast: held-out data are small, so their errors are raised before the long tokenization
    data = config.data
    held_out: AnyRows | None = None
    if data.eval:
        held_out = _read(data, data.eval, "eval", len(data.eval) > 1, tokenizer, world)
    train = _read(data, data.train, "train", data.mixing != "joined", tokenizer, world)
    batch = config.train.global_batch
    for count, unit in ((batch, "train.global_batch"), (len(train), "rows in data.train")):
        if count < world.size:
            raise UserError(
                f"{world.size} ranks but only {count} {unit}: some ranks would receive no data; "
                f"start at most {count} processes or enlarge {unit.rpartition(' ')[2]}"
            )
    if batch % world.size:
        log.warning(
            "train.global_batch %d is no multiple of %d ranks: some ranks idle in each step",
            batch,
            world.size,
            extra=ONCE,
        )
    probe = _probe(held_out or train)
    eval_loader = None if held_out is None else _loader(config, held_out, tokenizer, world)
    train_loader = _loader(config, train, tokenizer, world, _order(config, train))
    inputs = {
        "contents of data.train": _contents(train),
        "contents of data.eval": None if held_out is None else _contents(held_out),
        "tokenizer of base.path": tokenizer_digest(tokenizer),
        "chat template of base.path": template_digest(tokenizer),
        "chat template of data.train": train.chat_template and digest_of(train.chat_template)[:32],
    }
    return Loaders(train_loader, eval_loader, probe, train.chat_template, inputs)


def _contents(rows: AnyRows) -> str:
    return f"{len(rows)} rows, fingerprint {rows.fingerprint[:32]}"


def _probe(rows: AnyRows) -> Tensor:
    """Return probe tokens [sequences, tokens]: one sequence, or several labelled records."""
    count = 1 if isinstance(rows, RowSet) else PROBE_ROWS
    tokens = [rows.row(index)[0] for index in range(min(count, len(rows)))]
    width = min(PROBE_TOKENS, *map(len, tokens))
    return torch.stack([row[:width] for row in tokens])


def choice_loader(
    config: RunConfig,
    questions: Sequence[Question],
    skeleton: Skeleton,
    tokenizer: Tokenizer,
    world: World,
    extra: int,
) -> Loader:
    """Return a loader of this rank's share of the answers to multiple-choice questions.

    Args:
        extra: positions that the adapter puts in front of each sequence.

    Raises:
        UserError: an answer is longer than ``data.seq_len``, or does not fit the model.
    """
    loader = _loader(
        config, ChoiceRows(questions, tokenizer, config.data.seq_len), tokenizer, world
    )
    _check_fit("the questions", loader.rows, skeleton, extra)
    return loader


def check_fit(loaders: Loaders, skeleton: Skeleton, extra: int) -> None:
    """Check that the model has an embedding for every token and position of the data.

    Args:
        extra: positions that the adapter puts in front of each document.

    Raises:
        UserError: a token or position has no embedding.
    """
    for name, loader in (("data.train", loaders.train), ("data.eval", loaders.eval)):
        if loader is not None:
            _check_fit(name, loader.rows, skeleton, extra)


def _check_fit(name: str, rows: Rows, skeleton: Skeleton, extra: int) -> None:
    check_tokens(name, rows, skeleton)
    known = skeleton.positions
    # the padding of a packed sequence has positions too
    needed = rows.seq_len if rows.packed and skeleton.positions_are_learned else rows.longest
    needed += extra
    if known is None or needed <= known:
        return
    if skeleton.positions_are_learned:
        raise UserError(
            f"{name} needs {needed} positions but the base has learned {known}; "
            f"set data.seq_len to at most {known - extra}"
        )
    log.warning(
        "%s: the longest document needs %d positions, the base was made for %d "
        "(max_position_embeddings); results beyond may be poor",
        name,
        needed,
        known,
        extra=ONCE,
    )


def check_tokens(name: str, rows: Rows, skeleton: Skeleton) -> None:
    """Check that the model has an embedding for every token of ``rows``, called ``name``.

    Raises:
        UserError: a token has no embedding.
    """
    if rows.largest_token >= skeleton.vocabulary:
        raise UserError(
            f"{name} has token {rows.largest_token} but the base has embeddings for "
            f"{skeleton.vocabulary} tokens: the tokenizer in base.path is another model's"
        )


def read_rows(
    config: DataConfig, sources: list[DataSource], name: str, tokenizer: Tokenizer, world: World
) -> RowSet:
    """Load some sources; the first rank of each node tokenizes, the others read the cache.

    Raises:
        UserError: on every rank: unreadable, empty or unfit data.
    """
    return _cached(lambda: load_rows(config, sources, tokenizer, name=name), name, world)


def _read(
    config: DataConfig,
    sources: list[DataSource],
    name: str,
    apart: bool,
    tokenizer: Tokenizer,
    world: World,
) -> AnyRows:
    """Load sources, joined or, if ``apart``, as a ``Mixture`` of uniquely named parts.

    Labelled sources are separate tasks, so several of them are always a ``Mixture``.
    """
    read: Callable[..., list[RowSet] | list[LabelledRows]] = load_row_sets
    if config.classifies:
        read, apart = load_labelled, apart or len(sources) > 1
    elif not apart:
        return read_rows(config, sources, name, tokenizer, world)
    parts = _cached(partial(read, config, sources, tokenizer, name=name), name, world)
    if not apart:
        return parts[0]
    names: list[str] = []
    for source in sources:
        same = sum(n == source.task or n.startswith(f"{source.task}-") for n in names)
        names.append(f"{source.task}-{same + 1}" if same else source.task)
    return Mixture(parts, names)


def _cached(read: Callable[[], T], name: str, world: World) -> T:
    """Return ``read()``; the first rank of each node fills the cache before the others read."""
    found: list[T] = []
    for first in (True, False):
        with world.together(f"read data.{name}"):
            if world.is_first_of_node == first:
                found.append(read())
    return found[0]


def _order(config: RunConfig, rows: AnyRows) -> Order | None:
    if config.data.mixing == "joined":
        return None
    assert isinstance(rows, Mixture)
    return MixedOrder(
        shares_of(config.data, rows.sizes),
        global_batch=config.train.global_batch,
        seed=config.train.seed,
        shuffle=config.train.shuffle,
    )


def _loader(
    config: RunConfig,
    rows: Rows,
    tokenizer: Tokenizer,
    world: World,
    order: Order | None = None,
) -> Loader:
    kind = LabelledLoader if config.data.classifies else Loader
    return kind(
        rows,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        seed=config.train.seed,
        shuffle=config.train.shuffle,
        rank=world.rank,
        world_size=world.size,
        seq_len=config.data.seq_len,
        pad_id=pad_token(tokenizer) if config.data.classifies else tokenizer.pad_token_id or 0,
        order=order,
    )
