"""``dist-peft train``: the main job, in the order in which it happens."""

import argparse
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Self

import torch
from torch import nn

from dist_peft.app.build import Built, Prepared, give_start, load, prepare, with_labels
from dist_peft.app.effects import warn_of_idle_options
from dist_peft.app.quantize import with_solved_base
from dist_peft.app.rows import Loaders, check_fit, make_loaders
from dist_peft.app.session import Session
from dist_peft.app.solve import Stopped
from dist_peft.app.switch import AdapterBank
from dist_peft.app.tasks import TasksFile, task_configs
from dist_peft.core.config import RunConfig
from dist_peft.core.config_io import dump_config, load_config
from dist_peft.core.errors import UserError
from dist_peft.core.log import setup_log
from dist_peft.core.world import World
from dist_peft.data.labels import class_names
from dist_peft.export.outlook import log_outlook
from dist_peft.store.writer import atomic_write
from dist_peft.train.checkpoint import Checkpoints
from dist_peft.train.optim import make_optimizer_factory

__all__ = ["RESUMABLE", "run", "train"]

log = logging.getLogger("dist_peft")

RESUMABLE = 75
"""Exit code after a stop on a signal: a checkpoint is written, the same command goes on."""


def run(args: argparse.Namespace, world: World) -> int:
    return train(load_config(args.config, args.overrides), world)


def train(config: RunConfig, world: World) -> int:
    """Run ``config`` to its end, or until a signal; returns the exit code.

    Raises:
        UserError: on every rank, whatever rank found it.
    """
    if config.adapter.kind == "none":
        raise UserError("adapter.kind is none: nothing would be trained; choose lora")
    if config.train.tasks == "separate":
        task_configs(config)  # before anything is written: what is wrong with the list
    device = world.device(config.train.device)
    world.connect(device, config.engine.timeout_minutes, config.engine.start_timeout_minutes)
    with _catch_signals() as stop:
        return _train(config, world, device, stop)


def _train(config: RunConfig, world: World, device: torch.device, stop: Callable[[], bool]) -> int:
    run_dir = Path(config.save.dir)
    with world.together("prepare the run directory"):
        if world.is_first:
            _prepare_directory(run_dir)
    setup_log(run_dir, world.rank, world.size)
    try:
        config = with_solved_base(config, run_dir, world, device, stop)
    except Stopped:
        log.warning("stopped on a signal while solving the base; started again, it begins anew")
        return RESUMABLE
    separate = config.train.tasks == "separate"
    with world.together("read the base's configuration"):
        runs = task_configs(config) if separate else {"": config}
        prepared = prepare(next(iter(runs.values())), world)
        base = {"base": prepared.config.base}
        config = config.model_copy(update=base)
        runs = {name: run.model_copy(update=base) for name, run in runs.items()}
        if world.is_first:
            _write_config(run_dir, config)
    warn_of_idle_options(config, world, prepared.model, device.type)
    log_outlook(config, prepared.skeleton, prepared.directory)
    jobs = {name: _Job.of(run, prepared, world) for name, run in runs.items()}
    begun = next((job for job in jobs.values() if job.resume_from is not None), None)
    if begun is not None and begun.resume_from is not None:
        give_start(prepared, begun.checkpoints, begun.resume_from)
    built = load(prepared, config, world, device)
    call = built.optimize(make_optimizer_factory(config.train, device))
    sessions = {name: job.session(built, call, world) for name, job in jobs.items()}
    if separate:
        resume_from = {name: job.resume_from for name, job in jobs.items()}
        return _one_after_another(run_dir, built, sessions, resume_from, world, stop)
    return RESUMABLE if _run(sessions[""], jobs[""].resume_from, stop) else 0


@dataclass(frozen=True)
class _Job:
    """An adapter to train: the run's only one, or a task's; what can be said before loading."""

    config: RunConfig
    loaders: Loaders
    checkpoints: Checkpoints
    resume_from: Path | None

    @classmethod
    def of(cls, config: RunConfig, prepared: Prepared, world: World) -> Self:
        """Raises: UserError: on every rank: unfit data, or no such checkpoint."""
        loaders = make_loaders(config, prepared.tokenizer, world)
        check_fit(loaders, prepared.skeleton, prepared.adapter.extra_positions)
        directory = Path(config.save.dir) / "checkpoints"
        checkpoints = Checkpoints(directory, config.save.keep, world)
        with world.together("choose a checkpoint"):
            resume_from = checkpoints.choose(config.resume)
        return cls(config, loaders, checkpoints, resume_from)

    def session(self, built: Built, call: nn.Module, world: World) -> Session:
        built = with_labels(built, class_names(self.config.data))
        directory = Path(self.config.save.dir)
        return Session(self.config, world, built, call, self.loaders, self.checkpoints, directory)


def _run(session: Session, resume_from: Path | None, stop: Callable[[], bool]) -> bool:
    """Train to the end; true where a signal stopped it before."""
    first_step = session.resume(resume_from) if resume_from is not None else session.begin()
    done = session.fit(first_step, stop)
    if done < session.total_steps:
        log.warning("stopped on a signal after step %d; start again to go on", done)
        return True
    session.finish()
    return False


def _one_after_another(
    run_dir: Path,
    built: Built,
    sessions: dict[str, Session],
    resume_from: dict[str, Path | None],
    world: World,
    stop: Callable[[], bool],
) -> int:
    """Train the adapter of each task, every one from the same start."""
    with world.together("read tasks.json"):
        finished = TasksFile(run_dir)
    bank = AdapterBank(built)
    bank.keep("start")
    for number, (name, session) in enumerate(sessions.items(), 1):
        newest = resume_from[name]
        steps = finished.steps(name) if world.is_first else 0
        if newest is not None and session.ends_at(newest) and world.max(steps)[0]:
            log.info("task %s is finished", name)
            continue
        log.info("task %s, %d of %d, in %s", name, number, len(sessions), session.run_dir)
        with world.together("prepare the task's directory"):
            if world.is_first:
                finished.begin(name)
                _prepare_directory(session.run_dir)
                _write_config(session.run_dir, session.config)
        bank.activate("start")
        if _run(session, newest, stop):
            return RESUMABLE
        with world.together("write tasks.json"):
            if world.is_first:
                finished.finish(name, session.summary())
    return 0


def _prepare_directory(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write run directory {run_dir}: {error.strerror}") from None


def _write_config(run_dir: Path, config: RunConfig) -> None:
    try:
        atomic_write(run_dir / "config.yaml", dump_config(config))
    except OSError as error:
        raise UserError(f"cannot write run directory {run_dir}: {error.strerror}") from None


@contextmanager
def _catch_signals() -> Iterator[Callable[[], bool]]:
    """SIGTERM, SIGUSR1 (what schedulers send before the end) and Ctrl-C ask for a stop after the
    step; a second Ctrl-C stops at once."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
