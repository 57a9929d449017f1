"""Audit an exact run: compute some of its steps again, on any ranks, and compare bits.

The steps run as a resume does, from a checkpoint into a directory of their own, on the engine that
the number of processes asks for. Compared are the recorded losses, norms, rates and targets of each
step, the hash of parameters and moments wherever the run's chain of hashes has a link
(``train.state_chain``), and after the last step the adapter's tensors. The run is only read.
"""

import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dist_peft.app.chain_check import check_run_chain
from dist_peft.app.exact_scope import SCOPE_KEYS, describe_exact_scope, fix_kernels
from dist_peft.app.rank_setup import join_ranks
from dist_peft.app.resolved_config import configure_replay, resolve_finished_run
from dist_peft.app.run_chain import hash_base_files
from dist_peft.app.run_identity import describe_versions
from dist_peft.app.tasks import refuse_separate_tasks
from dist_peft.app.training_run import RESUMABLE, train_until_stopped
from dist_peft.core.config.io import load_run_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import AuditError, UserError
from dist_peft.core.input_paths import refuse_special_files
from dist_peft.core.log import close_log
from dist_peft.core.text_exchange import broadcast_text
from dist_peft.core.world import World, close_stall_watch
from dist_peft.model.hub import resolve_base_directory
from dist_peft.store.index import SafetensorsIndex
from dist_peft.train.checkpoint import CheckpointManager
from dist_peft.train.state_chain import StateChain, hash_file_bytes, read_chain
from dist_peft.train.step_metrics import METRICS_FILE, StepMetrics, read_metrics

__all__ = ["StopAfter", "find_difference", "replay_run"]

log = logging.getLogger("dist_peft")

_COMPARED = ("loss", "grad_norm", "lr", "tokens", "eval_loss")


class StopAfter:
    """Asks a run to stop after a number of steps, or on a signal."""

    def __init__(self, steps: int, is_signalled: Callable[[], bool]) -> None:
        self._left, self._is_signalled = steps, is_signalled

    def __call__(self) -> bool:
        self._left -= 1
        return self._is_signalled() or self._left <= 0


def replay_run(
    run_dir: Path,
    first: int,
    last: int,
    world: World,
    is_signalled: Callable[[], bool],
    *,
    allow_scope: bool,
    scratch: Path | None,
) -> int:
    """Compute steps ``first + 1`` to ``last`` of a run again and compare them.

    Args:
        is_signalled: whether a signal asks to stop.
        allow_scope: also on another processor, or with other threads or versions.
        scratch: holds the files of the replay while it runs.

    Returns:
        The exit code: 0, or 75 after a signal.

    Raises:
        UserError: not an exact run, no such steps, or another scope.
        AuditError: on every rank: names the first step or file that differs.
    """
    config, chain = _read_audited_run(run_dir, first, last)
    device = join_ranks(config, world)
    try:
        fix_kernels(config, device)
        path = run_dir / "checkpoints" / f"step-{first:06d}" if first else None
        with world.raise_together("compare with the run's scope"):
            if not allow_scope:
                _check_scope(config, run_dir, path, world)
        _check_base(config, run_dir, chain, world)
        with _make_scratch(scratch, world) as directory:
            every = math.gcd(*_list_link_steps(chain, first, last), last - first)
            replayed = configure_replay(config, run_dir, directory, path, every, world.size)
            stop = StopAfter(last - first, is_signalled)
            train_until_stopped(replayed, world, device, stop)
            found = _share_text(world, lambda: _compare(run_dir, directory, chain, first, last))
            close_log()
        return _print_result(found, first, last, world)
    finally:
        if world.size == 1:
            close_stall_watch()


def _read_audited_run(run_dir: Path, first: int, last: int) -> tuple[RunConfig, StateChain]:
    """Return configuration and checked chain of a run that has these steps."""
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run_dir} is no run directory: it has no config.yaml")
    refuse_special_files(run_dir)
    refuse_separate_tasks(run_dir)
    config = load_run_config(file, trust_remote_code=False)
    if not config.train.exact:
        raise UserError(
            f"{run_dir} was trained without train.exact: its steps have other bits each time, so "
            "that a replay proves nothing"
        )
    recorded = [record.step for record in read_metrics(run_dir / METRICS_FILE)]
    if not 0 <= first < last:
        raise UserError(f"--from {first} --to {last}: give 0 <= from < to")
    if missing := sorted(set(range(first + 1, last + 1)) - set(recorded)):
        most = max(recorded, default=0)
        raise UserError(f"{run_dir} has no record of step {missing[0]}; --to is at most {most}")
    if first and not (run_dir / "checkpoints" / f"step-{first:06d}").is_dir():
        known = [p.name.removeprefix("step-") for p in (run_dir / "checkpoints").glob("step-*")]
        raise UserError(
            f"--from {first}: {run_dir} keeps no checkpoint of that step; there are 0, "
            f"{', '.join(str(int(step)) for step in sorted(known))} (save.keep)"
        )
    chain = check_run_chain(run_dir)
    if chain is None:
        raise UserError(f"{run_dir} has no chain of hashes: an earlier version has trained it")
    return config, chain


def _list_link_steps(chain: StateChain, first: int, last: int) -> list[int]:
    """Return the distances from ``first`` of the steps whose state is known."""
    return [link.step - first for link in chain.links if first < link.step <= last]


def _check_scope(config: RunConfig, run_dir: Path, path: Path | None, world: World) -> None:
    """Compare processor, threads and versions with those of the run.

    Raises:
        UserError: one differs; names it.
    """
    if path is None:
        path = min((run_dir / "checkpoints").glob("step-*"))
    then = CheckpointManager.read_position(path).values
    now: Mapping[str, object] = {**describe_exact_scope(config, world), **describe_versions()}
    for key in (*SCOPE_KEYS, *describe_versions()):
        if then.get(key) != now[key]:
            raise UserError(
                f"{key} is {now[key]}, and was {then.get(key)} in {path}: bits need not be those "
                "of the run; replay where it is the same, or add --other-scope to compare anyway"
            )


def _check_base(config: RunConfig, run_dir: Path, chain: StateChain, world: World) -> None:
    """Compare the files of the base with those at the start of the run. Collective.

    Raises:
        UserError: one has other bytes, or is missing; names it.
    """
    with world.raise_together("look for the base"):
        directory = resolve_base_directory(resolve_finished_run(config, run_dir).base)
        index = SafetensorsIndex.open(directory)
    found = hash_base_files(index, directory, world)
    for name in sorted(found.keys() | chain.origin.base.keys()):
        if found.get(name) != chain.origin.base.get(name):
            raise UserError(
                f"{directory / name} is not the file that {run_dir} was trained on: its SHA-256 is "
                f"{found.get(name)}, and the chain of hashes begins with "
                f"{chain.origin.base.get(name)}; restore the base"
            )


@contextmanager
def _make_scratch(parent: Path | None, world: World) -> Iterator[Path]:
    """Yield a new directory that all ranks use, and remove it."""
    made = _share_text(world, lambda: tempfile.mkdtemp(prefix="dist_peft-replay-", dir=parent))
    try:
        yield Path(made) / "run"
    finally:
        close_log()
        if world.is_first:
            shutil.rmtree(made, ignore_errors=True)


def _share_text(world: World, make: Callable[[], str]) -> str:
    """Return the first rank's text on every rank."""
    text = ""
    with world.raise_together("replay"):
        if world.is_first:
            text = make()
    shared: str = json.loads(broadcast_text(json.dumps(text)))
    return shared


def _print_result(found: str, first: int, last: int, world: World) -> int:
    if found == _STOPPED:
        return RESUMABLE
    if found.startswith(_EQUAL):
        if world.is_first:
            print(f"steps {first + 1} to {last}: {found}")
        return 0
    raise AuditError(found)


_STOPPED, _EQUAL = "stopped", "equal"


def _compare(run_dir: Path, replay: Path, chain: StateChain, first: int, last: int) -> str:
    """Return the result of a replay as text: stopped, equal, or the first difference."""
    mine = {record.step: record for record in read_metrics(replay / METRICS_FILE)}
    its = {record.step: record for record in read_metrics(run_dir / METRICS_FILE)}
    if last not in mine:
        return _STOPPED
    newest = max((replay / "checkpoints").glob("step-*"))
    own = read_chain(newest)
    assert own is not None, "a replay is an exact run"
    if own.origin.data != chain.origin.data:
        raise UserError(f"data.train has other sequences than {run_dir} was trained on")
    found = find_difference(mine, its, own, chain, first, last)
    if found is not None:
        return found
    adapter = _compare_adapters(run_dir / "adapter", replay / "adapter")
    if adapter is not None:
        return adapter
    count = len(_list_link_steps(chain, first, last))
    text = f"{_EQUAL} in losses, norms, rates and targets, and in {count} recorded states"
    return text + (", adapter included" if (replay / "adapter").is_dir() else "")


def find_difference(
    mine: Mapping[int, StepMetrics],
    its: Mapping[int, StepMetrics],
    own: StateChain,
    chain: StateChain,
    first: int,
    last: int,
) -> str | None:
    """Return the first difference between replayed and recorded steps; None if there is none.

    Args:
        mine, its: replayed and recorded steps, by number.
        own, chain: chains of the replay and of the run.
    """
    states = {link.step: link.state for link in own.links}
    recorded = {link.step: link.state for link in chain.links}
    for step in range(first + 1, last + 1):
        for key in _COMPARED:
            new, old = getattr(mine[step], key), getattr(its[step], key)
            if new != old and None not in (new, old) and not (math.isnan(new) and math.isnan(old)):
                return f"step {step} is the first that differs: {key} is {new!r}, recorded {old!r}"
        if step in recorded and states.get(step) != recorded[step]:
            return (
                f"step {step} is the first that differs: parameters or moments have the SHA-256 "
                f"{states.get(step)}, recorded {recorded[step]}"
            )
    return None


def _compare_adapters(run: Path, replay: Path) -> str | None:
    """Compare tensors of two finished adapters; None where one is not there."""
    if not (run.is_dir() and replay.is_dir()):
        return None
    for file in sorted(replay.rglob("*.safetensors")):
        other = run / file.relative_to(replay)
        if not other.is_file() or hash_file_bytes(other) != hash_file_bytes(file):
            return f"{other} is not the adapter that the replayed steps give"
    return None
