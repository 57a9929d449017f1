"""Decide whether a run may resume from a checkpoint: keys that have to match or may change.

A checkpoint stores every key of the configuration and a fingerprint of each input
(``run_identity.describe_run_values``). A change is refused if it invalidates the stored tensors,
moments or
position: adapter, base, rows and their order, tokenizer, chat template, arithmetic. A change that
only affects later steps, or the location of files, is allowed and logged with the old and the new
value. ``docs/checkpoints.md`` has the table.
"""

import datetime
import importlib.metadata
import logging
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from dist_peft.app.data_setup import DataLoaders, make_data_loaders
from dist_peft.app.exact_scope import SCOPE_KEYS
from dist_peft.app.model_setup import ModelSetup
from dist_peft.app.run_identity import describe_rank_inputs, describe_run_values
from dist_peft.core.agreement import NOT_SET, format_value
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.core.world import World
from dist_peft.data.chat_date import freeze_template_date
from dist_peft.model.hub import Tokenizer
from dist_peft.train.checkpoint import CheckpointManager, RunPosition

__all__ = [
    "check_run_is_resumable",
    "check_trained_tokenizer",
    "make_dated_loaders",
    "may_change_on_resume",
    "read_run_inputs",
]

log = logging.getLogger("dist_peft")

_MAY_CHANGE = (
    # locations of files: contents are compared instead
    "base.path",
    "base.revision",
    "base.trust_remote_code",
    "adapter.adapters<>.path",
    "data.cache_dir",
    # parsing of records: the resulting rows are compared instead
    "data.train<>.path",
    "data.train<>.format",
    "data.train<>.columns.*",
    "data.train<>.column_names*",
    "data.train<>.ignore*",
    "data.train<>.template",
    "data.train<>.labels",
    "data.train<>.split",
    "data.train<>.limit",
    "data.train<>.name",
    "data.train<>.augment.synonyms",
    "data.allow_code",
    "data.too_long",
    "data.turn_end",
    # held-out data do not change the trained parameters
    "data.eval*",
    "contents of data.eval",
    # other ways to compute the same function
    "base.attention",
    "data.workers",
    "engine.*",
    "engine in use",
    "number of ranks",
    "train.micro_batch",
    "train.device",
    # text for the report
    "train.samples",
    "version of *",
    *SCOPE_KEYS,
    # later steps
    "train.steps",
    "train.epochs",
    "number of steps",
    "train.lr",
    "train.schedule",
    "train.warmup",
    "train.min_lr_ratio",
    "train.weight_decay",
    "train.max_grad_norm",
    "train.on_nonfinite",
    "train.max_nonfinite",
    # outputs and their frequency
    "train.spike_score",
    "train.eval_every",
    "train.early_stop",
    "train.log_every",
    "train.check_every",
    "save.*",
)
"""Patterns of keys, ``<>`` for an index. Other keys are refused, so a new key is refused by default
until it is added here."""

_KEPT_WHERE_EXACT = (
    "base.attention",
    "train.micro_batch",
    "train.device",
    "train.weight_decay",
    "train.max_grad_norm",
)
"""Keys of ``_MAY_CHANGE`` that change the bits of the steps."""

_ADAMW = {"adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"}
"""One algorithm: they differ in storage of the moments, which checkpoints hold in float32."""

_EXACT_SCOPE = (*SCOPE_KEYS, "version of ")
"""Beginnings of keys, within which bits are the same."""

_MOST_KEYS = 8

TEMPLATE_DATE = "date in the chat template"


def may_change_on_resume(key: str) -> bool:
    """Return whether ``key``, such as ``data.train[0].path``, may change when a run resumes."""
    pattern = re.sub(r"\[\d+\]", "<>", key)
    return any(fnmatchcase(pattern, allowed) for allowed in _MAY_CHANGE)


def read_run_inputs(
    config: RunConfig, setup: ModelSetup, world: World, resume_from: Path | None
) -> DataLoaders:
    """Load the data of a run; check that ranks agree and that ``resume_from`` can be resumed.

    A date in the chat template is that of the checkpoint, else of today (the latest of all ranks',
    in case midnight falls between them).

    Raises:
        UserError: on every rank: unfit data; ranks differ; the checkpoint is of another run.
    """
    found = None
    with world.raise_together("read a checkpoint's position"):
        if resume_from is not None:
            found = CheckpointManager.read_position(resume_from)
    loaders = make_dated_loaders(config, setup.tokenizer, world, found)
    inputs = describe_rank_inputs(config, setup, loaders, resume_from, world)
    world.check_agreement("inputs", inputs)
    if resume_from is not None and found is not None:
        check_run_is_resumable(
            resume_from, found, describe_run_values(config, setup, loaders, world)
        )
    return loaders


def make_dated_loaders(
    config: RunConfig, tokenizer: Tokenizer, world: World, found: RunPosition | None
) -> DataLoaders:
    """Make loaders with one date in the chat template: that of ``found``, else of today."""
    today = datetime.date.today().toordinal()
    stored = None if found is None else found.values.get(TEMPLATE_DATE)
    if isinstance(stored, str):
        today = _parse_template_date(stored).toordinal()
    date = datetime.date.fromordinal(int(world.max_over_ranks(today)[0]))
    with world.raise_together("freeze the date of the chat template"):
        tokenizer, written = freeze_template_date(tokenizer, date)
    loaders = make_data_loaders(config, tokenizer, world)
    loaders.inputs[TEMPLATE_DATE] = written
    return loaders


def _parse_template_date(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        return datetime.date.today()  # the comparison with the checkpoint then names both


def _check_position(path: Path, found: RunPosition) -> None:
    """Compare the numbers of ``run.json`` that select data and random numbers with its values."""
    batch, seed = found.values.get("train.global_batch"), found.values.get("train.seed")
    samples = found.step * batch if isinstance(batch, int) else None
    for name, mine, other in (("samples", found.samples, samples), ("seed", found.seed, seed)):
        if other is not None and mine != other:
            raise UserError(
                f"checkpoint {path} has a damaged run.json: {name} is {mine}, and by its values "
                f"{other}; resume another checkpoint"
            )


def check_trained_tokenizer(found: RunPosition, inputs: Mapping[str, object]) -> None:
    """Check that a run is evaluated with the tokenizer and chat templates it was trained with.

    Raises:
        UserError: another one. Where versions of ``tokenizers`` differ, a warning is logged.
    """
    keys = ("tokenizer of base.path", "chat template of base.path")
    other = [key for key in keys if found.values.get(key, inputs[key]) != inputs[key]]
    if not other:
        return
    told = f"{other[0]} is another one than the run was trained with"
    then, now = found.values.get("version of tokenizers"), importlib.metadata.version("tokenizers")
    if then != now:
        log.warning("%s, or version %s of tokenizers, now %s, reads it so", told, then, now)
        return
    raise UserError(f"{told}: the loss would be of other tokens; restore the base's files")


def check_run_is_resumable(path: Path, found: RunPosition, mine: Mapping[str, object]) -> None:
    """Check that this run may resume from checkpoint ``path``; log the allowed changes.

    Args:
        found: position stored in the checkpoint.
        mine: ``describe_run_values`` of this run.

    Raises:
        UserError: a key that has to match differs; names each with both values.
    """
    if not found.values:
        raise UserError(
            f"checkpoint {path} was written by an earlier version, which did not store the run's "
            "configuration; resume it with that version, or start over with resume: never"
        )
    _check_position(path, found)
    refused: list[tuple[str, str, str]] = []
    allowed: list[tuple[str, str, str]] = []
    for key in dict.fromkeys([*found.values, *mine]):
        before = format_value(found.values[key]) if key in found.values else NOT_SET
        now = format_value(mine[key]) if key in mine else NOT_SET
        if before == now:
            continue
        same = key == "train.optimizer" and {found.values.get(key), mine.get(key)} <= _ADAMW
        is_kept = key in _KEPT_WHERE_EXACT and mine.get("train.exact") is True
        changes = same or (may_change_on_resume(key) and not is_kept)
        (allowed if changes else refused).append((key, before, now))
    if refused:
        told = "; ".join(f"{key} is {now}, there {before}" for key, before, now in refused)
        if len(refused) > _MOST_KEYS:
            told = "; ".join(f"{k} is {n}, there {b}" for k, b, n in refused[:_MOST_KEYS])
            told += f"; and {len(refused) - _MOST_KEYS} more keys"
        raise UserError(
            f"checkpoint {path} is of another run: {told}. Restore these values, or start over "
            "with resume: never"
        )
    for key, before, now in allowed:
        log.info("resuming with %s %s, before %s", key, now, before, extra=ONCE)
        if mine.get("train.exact") is True and key.startswith(_EXACT_SCOPE):
            log.warning(
                "train.exact: %s is %s, before %s: from here on the bits need not be those of a "
                "run that was never stopped",
                *(key, now, before),
                extra=ONCE,
            )
