"""Whether a checkpoint may be resumed by a run: what must be the same, and what may change.

A checkpoint keeps every key of the configuration and a fingerprint of each thing that was read
(``run_identity.run_values``). Refused is what makes its tensors, moments or position mean something
else: adapter, base, rows and their order, tokenizer, chat template, arithmetic. Allowed, and told
with the old and the new value, is what only steers the steps to come, or says where things lie.
``docs/checkpoints.md`` has the table.
"""

import datetime
import logging
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from dist_peft.app.data_setup import Loaders, make_loaders
from dist_peft.app.model_setup import Prepared
from dist_peft.app.run_identity import rank_inputs, run_values
from dist_peft.core.agreement import NOT_SET, shown
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.core.world import World
from dist_peft.data.chat_date import with_frozen_date
from dist_peft.model.hub import Tokenizer
from dist_peft.train.checkpoint import Checkpoints, RunPosition

__all__ = ["check_resumable", "dated_loaders", "may_change", "read_inputs"]

log = logging.getLogger("dist_peft")

_MAY_CHANGE = (
    # where things lie: contents are compared instead
    "base.path",
    "base.revision",
    "base.trust_remote_code",
    "adapter.adapters<>.path",
    "data.cache_dir",
    # how records read: the rows that come of it are compared instead
    "data.train<>.path",
    "data.train<>.format",
    "data.train<>.columns.*",
    "data.train<>.ignore*",
    "data.train<>.template",
    "data.train<>.labels",
    "data.train<>.split",
    "data.train<>.limit",
    "data.train<>.name",
    "data.too_long",
    "data.turn_end",
    # held-out data do not change the trained parameters
    "data.eval*",
    "contents of data.eval",
    # the same function, computed in another way
    "base.attention",
    "engine.*",
    "engine in use",
    "number of ranks",
    "train.micro_batch",
    "train.device",
    "version of *",
    # the steps to come
    "train.steps",
    "train.epochs",
    "number of steps",
    "train.lr",
    "train.schedule",
    "train.warmup",
    "train.min_lr_ratio",
    "train.weight_decay",
    "train.max_grad_norm",
    # what is written and how often
    "train.eval_every",
    "train.log_every",
    "train.check_every",
    "save.*",
)
"""Patterns of keys, ``<>`` for the number in a list. Whatever is not named here is refused, so that
a new key is until somebody has thought about it."""

_ADAMW = {"adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"}
"""One algorithm: they differ in where and how they keep moments, which checkpoints hold in
float32."""

_MOST_KEYS = 8

TEMPLATE_DATE = "date in the chat template"


def may_change(key: str) -> bool:
    """Whether a resumed run may have another value of ``key``, such as ``data.train[0].path``."""
    pattern = re.sub(r"\[\d+\]", "<>", key)
    return any(fnmatchcase(pattern, allowed) for allowed in _MAY_CHANGE)


def read_inputs(
    config: RunConfig, prepared: Prepared, world: World, resume_from: Path | None
) -> Loaders:
    """The data of a run, once it is clear that every rank has the same inputs and that the run may
    go on from ``resume_from``.

    A date that the chat template writes is that of the checkpoint, else of today (the latest
    of the ranks', where midnight lies between them).

    Raises:
        UserError: on every rank: unfit data; ranks differ; the checkpoint is of another run.
    """
    found = None
    with world.together("read a checkpoint's position"):
        if resume_from is not None:
            found = Checkpoints.position(resume_from)
    loaders = dated_loaders(config, prepared.tokenizer, world, found)
    world.agree("inputs", rank_inputs(config, prepared, loaders, resume_from))
    if resume_from is not None and found is not None:
        check_resumable(resume_from, found, run_values(config, prepared, loaders, world))
    return loaders


def dated_loaders(
    config: RunConfig, tokenizer: Tokenizer, world: World, found: RunPosition | None
) -> Loaders:
    """``make_loaders`` with one date in the chat template: that of ``found``, else of today."""
    today = datetime.date.today().toordinal()
    stored = None if found is None else found.values.get(TEMPLATE_DATE)
    if isinstance(stored, str):
        today = _date(stored).toordinal()
    date = datetime.date.fromordinal(int(world.max(today)[0]))
    with world.together("freeze the date of the chat template"):
        tokenizer, written = with_frozen_date(tokenizer, date)
    loaders = make_loaders(config, tokenizer, world)
    loaders.inputs[TEMPLATE_DATE] = written
    return loaders


def _date(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        return datetime.date.today()  # the comparison with the checkpoint then names both


def check_resumable(path: Path, found: RunPosition, mine: Mapping[str, object]) -> None:
    """See that this run may go on from checkpoint ``path``; log what has changed in it.

    Args:
        found: of the checkpoint.
        mine: ``run_values`` of this run.

    Raises:
        UserError: it may not; names each key with both values.
    """
    if not found.values:
        raise UserError(
            f"checkpoint {path} was written by an earlier version, which did not keep what the run "
            "was; resume it with that version, or start over with resume: never"
        )
    refused: list[tuple[str, str, str]] = []
    allowed: list[tuple[str, str, str]] = []
    for key in dict.fromkeys([*found.values, *mine]):
        before = shown(found.values[key]) if key in found.values else NOT_SET
        now = shown(mine[key]) if key in mine else NOT_SET
        if before == now:
            continue
        same = key == "train.optimizer" and {found.values.get(key), mine.get(key)} <= _ADAMW
        (allowed if same or may_change(key) else refused).append((key, before, now))
    if refused:
        told = "; ".join(f"{key} is {now}, there {before}" for key, before, now in refused)
        if len(refused) > _MOST_KEYS:
            told = "; ".join(f"{k} is {n}, there {b}" for k, b, n in refused[:_MOST_KEYS])
            told += f"; and {len(refused) - _MOST_KEYS} more keys"
        raise UserError(
            f"checkpoint {path} is of another run: {told}. Restore what differs, or start over "
            "with resume: never"
        )
    for key, before, now in allowed:
        log.info("resuming with %s %s, before %s", key, now, before, extra=ONCE)
