"""``dist-peft train``: fine-tune an adapter, in execution order."""

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

from dist_peft.app.adapter_bank import AdapterBank
from dist_peft.app.base_content import BaseRequirement, read_checkpoint_bases
from dist_peft.app.config_arguments import add_config_arguments
from dist_peft.app.data_setup import DataLoaders, check_loaders_fit_model
from dist_peft.app.gptq_solver import CalibrationInterrupted
from dist_peft.app.model_setup import (
    LoadedModel,
    ModelSetup,
    build_model,
    load_init_factors,
    load_weights,
    replace_labels,
)
from dist_peft.app.quantized_base import ensure_solved_base, must_solve_base
from dist_peft.app.resuming import read_run_inputs
from dist_peft.app.run_identity import flatten_rank_config
from dist_peft.app.tasks import TasksFile, split_task_configs
from dist_peft.app.trainer import Trainer
from dist_peft.app.unused_options import warn_unused_options
from dist_peft.core.config.io import dump_config, load_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import setup_log
from dist_peft.core.world import World
from dist_peft.data.labels import list_class_names
from dist_peft.export.outlook import log_export_outlook
from dist_peft.store.writer import write_atomically
from dist_peft.train.checkpoint import CheckpointManager
from dist_peft.train.optimizers import make_optimizer_factory

__all__ = ["RESUMABLE", "add_arguments", "run", "train_from_config"]

log = logging.getLogger("dist_peft")

RESUMABLE = 75
"""Exit code after a stop on a signal: rerun the same command to resume from the checkpoint."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft train``."""
    add_config_arguments(parser)


def run(args: argparse.Namespace, world: World) -> int:
    """Train the configuration of ``--config`` and its overrides; return the exit code."""
    return train_from_config(load_config(args.config, args.overrides), world)


def train_from_config(config: RunConfig, world: World) -> int:
    """Train ``config`` to its last step, or until a signal; return the exit code.

    Raises:
        UserError: on every rank, whichever rank found the error.
    """
    if config.adapter.kind == "none":
        raise UserError("adapter.kind is none: nothing would be trained; choose lora")
    if config.train.tasks == "separate":
        split_task_configs(
            config
        )  # fail fast: validates the list of tasks before anything is written
    device = world.select_device(config.train.device)
    world.join_process_group(
        device, config.engine.timeout_minutes, config.engine.start_timeout_minutes
    )
    world.check_agreement("configuration", flatten_rank_config(config, world))
    with _catch_signals() as stop:
        return _train_until_stopped(config, world, device, stop)


def _train_until_stopped(
    config: RunConfig, world: World, device: torch.device, stop: Callable[[], bool]
) -> int:
    """Check, load and train, in an order in which a refused command changes no file.

    First all checks without weights, then the run directory and its log, loading, the checks that
    need the model, and ``config.yaml`` last, since merge and export rely on it.
    """
    run_dir = Path(config.save.dir)
    setup_log(None, world.rank, world.size, hold=True)
    with world.raise_together("look at the run directory"):
        if world.is_first:
            _check_writable(run_dir)
        solving = must_solve_base(config, run_dir)
    if solving:
        # checkpoints are of the quantized base: none can match the unquantized one checked here
        fresh = config.model_copy(update={"resume": "never"})
        _prepare_adapter_jobs(fresh, world, device, solving=True)  # fail fast, before hours of GPTQ
        _open_run_directory(run_dir, world)
    try:
        config = ensure_solved_base(config, run_dir, world, device, stop)
    except CalibrationInterrupted:
        log.warning("stopped on a signal during GPTQ calibration; rerunning restarts calibration")
        return RESUMABLE
    config, prepared, jobs = _prepare_adapter_jobs(config, world, device)
    trained_on = [base for job in jobs.values() for base in job.trained_on]
    begun = next((job for job in jobs.values() if job.resume_from is not None), None)
    _open_run_directory(run_dir, world)
    if begun is not None and begun.resume_from is not None:
        load_init_factors(prepared, begun.checkpoints, begun.resume_from)
    built = load_weights(prepared, config, world, device, trained_on)
    call = built.setup_optimizer(make_optimizer_factory(config.train, device))
    sessions = {name: job.make_trainer(built, call, world) for name, job in jobs.items()}
    next(iter(sessions.values())).check_loaded_model()
    if config.train.tasks == "separate":
        with world.raise_together("write config.yaml"):
            if world.is_first:
                _write_config(run_dir, config)
        resume_from = {name: job.resume_from for name, job in jobs.items()}
        return _train_tasks_sequentially(run_dir, built, sessions, resume_from, world, stop)
    return RESUMABLE if _run_trainer(sessions[""], jobs[""].resume_from, world, stop) else 0


def _prepare_adapter_jobs(
    config: RunConfig, world: World, device: torch.device, *, solving: bool = False
) -> "tuple[RunConfig, ModelSetup, dict[str, _AdapterJob]]":
    """Run every check that needs no weights; write nothing but the token cache.

    Returns:
        the configuration with the base that is used, the model on meta with its adapter, and the
        adapters to train by task; a run of one adapter has one job, named "".

    Raises:
        UserError: on every rank.
    """
    with world.raise_together("read the base's configuration"):
        runs = split_task_configs(config) if config.train.tasks == "separate" else {"": config}
        packed_tokens = config.data.seq_len if config.data.packing else 0
        first = next(iter(runs.values()))
        prepared = build_model(first, world, solving=solving, packed_tokens=packed_tokens)
        base = {"base": prepared.config.base}
        config = config.model_copy(update=base)
        runs = {name: run.model_copy(update=base) for name, run in runs.items()}
    warn_unused_options(config, world, prepared.model, device.type)
    if not solving:
        log_export_outlook(config, prepared.skeleton, prepared.directory)
    return (
        config,
        prepared,
        {name: _AdapterJob.check_inputs(run, prepared, world) for name, run in runs.items()},
    )


@dataclass(frozen=True)
class _AdapterJob:
    """An adapter to train, of the run or of one task, with everything known before loading."""

    config: RunConfig
    loaders: DataLoaders
    checkpoints: CheckpointManager
    resume_from: Path | None
    trained_on: list[BaseRequirement]

    @classmethod
    def check_inputs(cls, config: RunConfig, prepared: ModelSetup, world: World) -> Self:
        """Read the data and select the checkpoint to resume.

        Raises:
            UserError: on every rank: unfit data, other data on another rank, or a checkpoint that
                does not exist or is of another run.
        """
        directory = Path(config.save.dir) / "checkpoints"
        checkpoints = CheckpointManager(directory, config.save.keep, world)
        with world.raise_together("choose a checkpoint"):
            resume_from = checkpoints.select_checkpoint(config.resume)
        resumed = [] if resume_from is None else [resume_from]
        # first of all comparisons with the checkpoint, since it names the keys of config.json
        with world.raise_together("compare the base with that of the checkpoint"):
            trained_on = read_checkpoint_bases(resumed, prepared.skeleton.index)
        loaders = read_run_inputs(config, prepared, world, resume_from)
        check_loaders_fit_model(loaders, prepared.skeleton, prepared.adapter.num_extra_positions)
        return cls(config, loaders, checkpoints, resume_from, trained_on)

    def make_trainer(self, built: LoadedModel, call: nn.Module, world: World) -> Trainer:
        built = replace_labels(built, list_class_names(self.config.data))
        directory = Path(self.config.save.dir)
        return Trainer(self.config, world, built, call, self.loaders, self.checkpoints, directory)


def _run_trainer(
    session: Trainer, resume_from: Path | None, world: World, stop: Callable[[], bool]
) -> bool:
    """Train to the last step; return whether a signal stopped it before."""
    first_step = (
        session.resume_from_checkpoint(resume_from)
        if resume_from is not None
        else session.start_run()
    )
    with world.raise_together("write config.yaml"):
        if world.is_first:
            _write_config(session.run_dir, session.config)
    done = session.run_training_loop(first_step, stop)
    if done < session.total_steps:
        log.warning("stopped on a signal after step %d; rerun the same command to resume", done)
        return True
    session.finish_run()
    return False


def _train_tasks_sequentially(
    run_dir: Path,
    built: LoadedModel,
    sessions: dict[str, Trainer],
    resume_from: dict[str, Path | None],
    world: World,
    stop: Callable[[], bool],
) -> int:
    """Train the adapter of each task, all from the same initialization; return the exit code."""
    with world.raise_together("read tasks.json"):
        finished = TasksFile(run_dir)
    bank = AdapterBank(built)
    bank.store_active_adapter("start")
    for number, (name, session) in enumerate(sessions.items(), 1):
        newest = resume_from[name]
        steps = finished.get_finished_steps(name) if world.is_first else 0
        if (
            newest is not None
            and session.is_final_checkpoint(newest)
            and world.max_over_ranks(steps)[0]
        ):
            log.info("task %s is finished", name)
            continue
        log.info("task %s, %d of %d, in %s", name, number, len(sessions), session.run_dir)
        with world.raise_together("prepare the task's directory"):
            if world.is_first:
                finished.mark_started(name)
                _make_run_directory(session.run_dir)
        bank.activate_adapter("start")
        if _run_trainer(session, newest, world, stop):
            return RESUMABLE
        with world.raise_together("write tasks.json"):
            if world.is_first:
                finished.mark_finished(name, session.make_report_summary())
    return 0


def _check_writable(run_dir: Path) -> None:
    """Check that ``run_dir`` can be created or written, without changing it.

    Raises:
        UserError: it is a file or not writable.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"save.dir {run_dir} is a file; give a directory")
    nearest = next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise UserError(f"cannot write run directory {run_dir}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"cannot write run directory {run_dir}: no permission to write {nearest}")


def _open_run_directory(run_dir: Path, world: World) -> None:
    """Create the directory and continue the log in its ``log.txt``."""
    with world.raise_together("prepare the run directory"):
        if world.is_first:
            _make_run_directory(run_dir)
        setup_log(run_dir, world.rank, world.size)


def _make_run_directory(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write run directory {run_dir}: {error.strerror}") from None


def _write_config(run_dir: Path, config: RunConfig) -> None:
    try:
        write_atomically(run_dir / "config.yaml", dump_config(config))
    except OSError as error:
        raise UserError(f"cannot write run directory {run_dir}: {error.strerror}") from None


@contextmanager
def _catch_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether a signal has requested a stop after the current step.

    The signals are SIGTERM, SIGUSR1 (sent by schedulers before the time limit) and Ctrl-C; a second
    Ctrl-C stops at once.
    """
    caught: list[int] = []

    def record_signal(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.signal(number, record_signal) for number in numbers]
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
