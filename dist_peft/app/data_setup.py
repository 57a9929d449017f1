"""Build the data loaders of a run from the ``data`` section."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from dist_peft.core.agreement import hash_json_value
from dist_peft.core.config.run import DataConfig, DataSource, RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.core.world import World
from dist_peft.data.classification import LabelledLoader, LabelledSequences, load_labelled_sequences
from dist_peft.data.documents import SequenceSet, load_sequence_set, load_sequence_sets
from dist_peft.data.labels import list_class_tasks
from dist_peft.data.loader import (
    Batch,
    Loader,
    SequenceDataset,
    TokenLoader,
    count_micro_batches,
)
from dist_peft.data.mixture import SequenceMixture
from dist_peft.data.multiple_choice import ChoiceQuestion, ChoiceSequences
from dist_peft.data.order import MixtureOrder, SequenceOrder, make_mixture_shares
from dist_peft.data.tokenizer_digest import compute_template_digest, compute_tokenizer_digest
from dist_peft.model.classifier import choose_pad_token_id
from dist_peft.model.hub import Tokenizer
from dist_peft.model.skeleton import Skeleton
from dist_peft.train.domain_objective import DomainObjective
from dist_peft.train.objective import ClassificationObjective, Objective, TokenObjective
from dist_peft.train.router_objective import RouterObjective

__all__ = [
    "DataLoaders",
    "check_loaders_fit_model",
    "check_token_range",
    "load_source_rows",
    "make_choice_loader",
    "make_data_loaders",
]

log = logging.getLogger("dist_peft")

PROBE_TOKENS = 64
PROBE_ROWS = 8

AnyRows = SequenceSet | LabelledSequences | SequenceMixture


@dataclass
class DataLoaders:
    """Loaders of training and held-out data, and probe tokens whose logits are compared.

    Attributes:
        objective: takes the batches of both loaders.
        chat_template: that of the training conversations, if it is not the base's.
        has_conversations: whether the training data have any; None: unknown.
        inputs: fingerprints of all inputs, by key, for comparisons (``app.run_identity``).
    """

    objective: Objective[Any]
    train: Loader[Any]
    eval: Loader[Any] | None
    probe: Tensor
    chat_template: str | None
    has_conversations: bool | None
    inputs: dict[str, str | None]


def make_data_loaders(config: RunConfig, tokenizer: Tokenizer, world: World) -> DataLoaders:
    """Tokenize (once per node, other ranks read the cache) and build this rank's loaders.

    Raises:
        UserError: on every rank: unreadable, empty or unfit data, or more ranks than rows.
    """
    # fail fast: held-out data are small, so their errors are raised before the long tokenization
    data = config.data
    held_out: AnyRows | None = None
    if sources := data.held_out:
        held_out = _load_rows_by_task(data, sources, "eval", len(sources) > 1, tokenizer, world)
    train = _load_rows_by_task(data, data.train, "train", data.mixing != "joined", tokenizer, world)
    with world.raise_together("make the data loaders"):  # ranks may have read different files
        _refuse_idle_ranks(config.train.global_batch, len(train), world.data_size)
        probe = _select_probe_tokens(held_out or train, data.is_classification)
        eval_loader = None if held_out is None else _make_loader(config, held_out, tokenizer, world)
        order = _make_mixed_order(config, train)
        train_loader = _make_loader(config, train, tokenizer, world, order)
    _warn_of_idle_ranks(config, world.data_size)
    if data.chat_template is not None and train.chat_template is None:
        log.warning(
            "data.chat_template has no effect: data.train holds no conversations", extra=ONCE
        )
    inputs = {
        "contents of data.train": _fingerprint_rows(train),
        "contents of data.eval": None if held_out is None else _fingerprint_rows(held_out),
        "tokenizer of base.path": compute_tokenizer_digest(tokenizer),
        "chat template of base.path": compute_template_digest(tokenizer),
        "chat template of data.train": train.chat_template
        and hash_json_value(train.chat_template)[:32],
    }
    trains_router = getattr(config.adapter, "train_router", False)
    objective: Objective[Any] = RouterObjective() if trains_router else TokenObjective()
    if data.is_classification:
        objective = ClassificationObjective(list_class_tasks(data))
        if (section := config.train.domain_adversarial) is not None:
            objective = DomainObjective(list_class_tasks(data), section)
    chats = train.chat_template, train.has_conversations
    return DataLoaders(objective, train_loader, eval_loader, probe, *chats, inputs)


def _refuse_idle_ranks(batch: int, rows: int, ranks: int) -> None:
    for count, unit in ((batch, "train.global_batch"), (rows, "rows in data.train")):
        if count < ranks:
            raise UserError(
                f"{ranks} ranks but only {count} {unit}: some ranks would receive no "
                f"data; start at most {count} processes or enlarge {unit.rpartition(' ')[2]}"
            )


def _warn_of_idle_ranks(config: RunConfig, ranks: int) -> None:
    """Warn where a step's micro-batches cannot keep all ranks busy; name a size that can."""
    batch, micro = config.train.global_batch, config.train.micro_batch
    count = count_micro_batches(batch, micro)
    if count % ranks == 0:
        return
    smaller = range(min(micro, batch) - 1, 0, -1)
    even = next((m for m in smaller if count_micro_batches(batch, m) % ranks == 0), None)
    log.warning(
        "the %d sequences of train.global_batch make %d micro-batches of at most %d, which is no "
        "multiple of %d ranks: some ranks idle in each step; set %s",
        batch,
        count,
        micro,
        ranks,
        f"train.micro_batch to {even}"
        if even is not None
        else f"train.global_batch to a multiple of {ranks}",
        extra=ONCE,
    )


def _fingerprint_rows(rows: AnyRows) -> str:
    return f"{len(rows)} rows, fingerprint {rows.fingerprint[:32]}"


def _select_probe_tokens(rows: AnyRows, labelled: bool) -> Tensor:
    """Return probe tokens [sequences, tokens]: one sequence, or several of labelled records and of
    named tasks."""
    count = PROBE_ROWS if labelled or rows.task_names != ("",) else 1
    tokens = [rows.get_sequence(index)[0] for index in range(min(count, len(rows)))]
    width = min(PROBE_TOKENS, *map(len, tokens))
    return torch.stack([row[:width] for row in tokens])


def make_choice_loader(
    config: RunConfig,
    questions: Sequence[ChoiceQuestion],
    skeleton: Skeleton,
    tokenizer: Tokenizer,
    world: World,
    extra: int,
) -> Loader[Batch]:
    """Return a loader of this rank's share of the answers to multiple-choice questions.

    Args:
        extra: positions that the adapter puts in front of each sequence.

    Raises:
        UserError: an answer is longer than ``data.seq_len``, or does not fit the model.
    """
    loader = _make_loader(
        config, ChoiceSequences(questions, tokenizer, config.data.seq_len), tokenizer, world
    )
    _check_rows_fit_model("the questions", loader, skeleton, extra)
    return loader


def check_loaders_fit_model(loaders: DataLoaders, skeleton: Skeleton, extra: int) -> None:
    """Check that the model has an embedding for every token and position of the data.

    Args:
        extra: positions that the adapter puts in front of each document.

    Raises:
        UserError: a token or position has no embedding.
    """
    for name, loader in (("data.train", loaders.train), ("data.eval", loaders.eval)):
        if loader is not None:
            _check_rows_fit_model(name, loader, skeleton, extra)


def _check_rows_fit_model(name: str, loader: Loader[Any], skeleton: Skeleton, extra: int) -> None:
    rows = loader.rows
    check_token_range(name, rows, skeleton)
    if loader.pad_id >= skeleton.vocabulary_size:
        if skeleton.head is not None:  # it finds the last token of a text by the padding
            raise UserError(
                f"the padding token of base.path has id {loader.pad_id}, and the base has "
                f"embeddings for {skeleton.vocabulary_size} tokens; set pad_token in "
                "tokenizer_config.json to one of these, such as the eos_token"
            )
        loader.pad_id = 0  # any token with an embedding: padding is never attended to
    known = skeleton.max_positions
    # the padding of a packed sequence has positions too
    needed = rows.seq_len if rows.packed and skeleton.has_learned_positions else rows.longest
    needed += extra
    if known is None or needed <= known:
        return
    if skeleton.has_learned_positions:
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


def check_token_range(name: str, rows: SequenceDataset, skeleton: Skeleton) -> None:
    """Check that the model has an embedding for every token of ``rows``, called ``name``.

    Raises:
        UserError: a token has no embedding.
    """
    if rows.largest_token >= skeleton.vocabulary_size:
        raise UserError(
            f"{name} has token {rows.largest_token} but the base has embeddings for "
            f"{skeleton.vocabulary_size} tokens: the tokenizer in base.path is another model's, or "
            "has an added token that the model was never resized for; keep that token out of the "
            "data, or resize the base's embeddings (transformers: resize_token_embeddings)"
        )


def load_source_rows(
    config: DataConfig, sources: list[DataSource], name: str, tokenizer: Tokenizer, world: World
) -> SequenceSet:
    """Load some sources; the first rank of each node tokenizes, the others read the cache.

    Raises:
        UserError: on every rank: unreadable, empty or unfit data.
    """
    return world.run_node_first(
        f"read data.{name}", lambda: load_sequence_set(config, sources, tokenizer, name=name)
    )


def _load_rows_by_task(
    config: DataConfig,
    sources: list[DataSource],
    name: str,
    apart: bool,
    tokenizer: Tokenizer,
    world: World,
) -> AnyRows:
    """Load sources, joined or, if ``apart``, as a ``SequenceMixture`` of uniquely named parts.

    Labelled sources are separate tasks, so several of them are always a ``SequenceMixture``.
    """
    read: Callable[..., list[SequenceSet] | list[LabelledSequences]] = load_sequence_sets
    if config.is_classification:
        read, apart = load_labelled_sequences, apart or len(sources) > 1
    elif not apart:
        return load_source_rows(config, sources, name, tokenizer, world)
    parts = world.run_node_first(
        f"read data.{name}", partial(read, config, sources, tokenizer, name=name)
    )
    if not apart:
        return parts[0]
    names: list[str] = []
    for source in sources:
        same = sum(n == source.task_name or n.startswith(f"{source.task_name}-") for n in names)
        names.append(f"{source.task_name}-{same + 1}" if same else source.task_name)
    return SequenceMixture(parts, names)


def _make_mixed_order(config: RunConfig, rows: AnyRows) -> SequenceOrder | None:
    if config.data.mixing == "joined":
        return None
    mixture = cast(SequenceMixture, rows)  # sources that are mixed are read apart
    return MixtureOrder(
        make_mixture_shares(config.data, mixture.sequence_counts, mixture.part_epochs),
        global_batch=config.train.global_batch,
        seed=config.train.seed,
        shuffle=config.train.shuffle,
    )


def _make_loader(
    config: RunConfig,
    rows: SequenceDataset,
    tokenizer: Tokenizer,
    world: World,
    order: SequenceOrder | None = None,
) -> Loader[Any]:
    kind: type[Loader[Any]] = LabelledLoader if config.data.is_classification else TokenLoader
    return kind(
        rows,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        seed=config.train.seed,
        shuffle=config.train.shuffle,
        data_rank=world.data_rank,
        data_size=world.data_size,
        seq_len=config.data.seq_len,
        # Embeddings of padding tokens may be zero, and code that divides by the size of a hidden
        # state (Gemma 3n) has no gradient there; no logits of a target depend on this choice.
        pad_id=choose_pad_token_id(tokenizer)
        if config.data.is_classification
        else tokenizer.eos_token_id,
        order=order,
    )
