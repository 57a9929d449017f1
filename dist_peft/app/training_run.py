"""Train the adapters of a run, in execution order: check, quantize, load, train, write."""

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch import nn

from dist_peft.app.adapter_bank import AdapterBank
from dist_peft.app.base_content import BaseRequirement, read_checkpoint_bases
from dist_peft.app.data_setup import DataLoaders, check_loaders_fit_model
from dist_peft.app.document_isolation import count_packed_tokens
from dist_peft.app.earlier_log import append_to_earlier_log
from dist_peft.app.model_setup import (
    LoadedModel,
    ModelSetup,
    build_model,
    load_init_factors,
    replace_labels,
)
from dist_peft.app.python_api import load_with_adapter
from dist_peft.app.quantized_base import ensure_solved_base, must_solve_base
from dist_peft.app.rank_setup import download_base_once
from dist_peft.app.resolved_config import ResolvedConfig, resolve_config, resolve_unsolved_run
from dist_peft.app.resuming import read_run_inputs
from dist_peft.app.run_directory import RunDirectory, make_run_directory, write_run_config
from dist_peft.app.run_identity import count_total_steps
from dist_peft.app.tasks import TasksFile
from dist_peft.app.trainer import Trainer
from dist_peft.app.unused_options import warn_unused_options
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE, setup_log
from dist_peft.core.progress_beat import SETUP_PATIENCE, enter_phase
from dist_peft.core.stop_signals import RESUMABLE, StopRequested
from dist_peft.core.world import World
from dist_peft.data.labels import list_class_names
from dist_peft.export.outlook import log_export_outlook
from dist_peft.train.checkpoint import CheckpointManager
from dist_peft.train.trackers import check_trackers_installed

__all__ = ["RESUMABLE", "train_until_stopped"]

log = logging.getLogger("dist_peft")


def train_until_stopped(
    config: RunConfig, world: World, device: torch.device, stop: Callable[[], bool]
) -> int:
    """Check, load and train, in an order in which a refused command changes no file.

    First all checks without weights, then the run directory and its log, loading, the checks that
    need the model, and ``config.yaml`` last, since merge and export rely on it.

    Args:
        world: after ``World.join_process_group``.
        stop: returns whether a signal has requested a stop.

    Returns:
        The exit code: 0, or ``RESUMABLE`` after a signal.

    Raises:
        UserError: on every rank, whichever rank found the error.
    """
    with RunDirectory(Path(config.save.dir), world) as directory:
        try:
            code = _train_in_directory(config, directory, world, device, stop)
        except StopRequested as request:
            text = f"{request} before a step was done; rerun the same command to resume"
            log.warning("%s", text)
            append_to_earlier_log(text)
            code = RESUMABLE
        return directory.record_exit_code(code)


def _train_in_directory(
    config: RunConfig,
    directory: RunDirectory,
    world: World,
    device: torch.device,
    stop: Callable[[], bool],
) -> int:
    run_dir = directory.path
    setup_log(None, world.rank, world.size, hold=True)
    world.raise_if_stop_requested()
    with world.raise_together("look at the run directory"):
        directory.check_usable()
    world.run_on_first("look for trackers", partial(check_trackers_installed, config.save.track))
    download_base_once(config.base, world)
    with world.raise_together("look for a solved base"):
        solving = must_solve_base(config, run_dir)
    if solving:
        with world.raise_together("read the base's configuration"):
            unsolved = resolve_unsolved_run(config)
        _prepare_adapter_jobs(unsolved, world, device, "never")  # fail fast, before hours of GPTQ
        directory.open()
    solved = ensure_solved_base(config, run_dir, world, device, stop)
    with world.raise_together("read the base's configuration"):
        resolved = resolve_config(config, solved)
    return _train_resolved(resolved, directory, world, device, stop)


def _train_resolved(
    resolved: ResolvedConfig,
    directory: RunDirectory,
    world: World,
    device: torch.device,
    stop: Callable[[], bool],
) -> int:
    """Train the run's adapters, in as many phases as the method has; return the exit code.

    Between two phases the base is loaded again, in another form, and the training continues from a
    checkpoint, as a resumed run does.
    """
    code = _train_phase(resolved, directory, world, device, stop, resolved.run.resume)
    while code is None:
        gc.collect()  # hooks and modules refer to each other
        code = _train_phase(resolved, directory, world, device, stop, "auto")
    return code


def _train_phase(
    resolved: ResolvedConfig,
    directory: RunDirectory,
    world: World,
    device: torch.device,
    stop: Callable[[], bool],
    resume: str,
) -> int | None:
    """Check, load the base and train its adapters, one after another.

    Returns:
        The exit code; None at the end of a phase that is not the last.
    """
    config, run_dir = resolved.run, directory.path
    setup, jobs = _prepare_adapter_jobs(resolved, world, device, resume)
    world.raise_if_stop_requested()
    trained_on = [base for job in jobs.values() for base in job.trained_on]
    begun = next((job for job in jobs.values() if job.resume_from is not None), None)
    directory.open()
    if begun is not None and begun.resume_from is not None:
        load_init_factors(setup, begun.checkpoints, begun.resume_from)
    loaders = next(iter(jobs.values())).loaders if begun is None else None
    built, call = load_with_adapter(setup, world, device, trained_on, loaders)
    trainers = {name: job.make_trainer(built, call, world) for name, job in jobs.items()}
    next(iter(trainers.values())).check_loaded_model()
    if config.train.tasks == "separate":
        world.run_on_first("write config.yaml", partial(write_run_config, run_dir, config))
        resume_from = {name: job.resume_from for name, job in jobs.items()}
        return _train_tasks_sequentially(run_dir, built, trainers, resume_from, world, stop)
    return _run_trainer(trainers[""], jobs[""].resume_from, world, stop)


def _prepare_adapter_jobs(
    resolved: ResolvedConfig, world: World, device: torch.device, resume: str
) -> "tuple[ModelSetup, dict[str, _AdapterJob]]":
    """Run every check that needs no weights; write nothing but the token cache.

    Returns:
        the model on meta with its adapter, and the adapters to train by task; a run of one adapter
        has one job, named "".

    Raises:
        UserError: on every rank.
    """
    config = resolved.run
    with world.raise_together("read the base's configuration"):
        runs = resolved.split_tasks() if config.train.tasks == "separate" else {"": resolved}
        packed_tokens = count_packed_tokens(config)
        setup = build_model(next(iter(runs.values())), packed_tokens=packed_tokens)
    warn_unused_options(config, world, setup.model, device.type)
    if not resolved.is_unsolved:
        log_export_outlook(config, setup.adapter, setup.skeleton, setup.directory)
    jobs = {
        name: _AdapterJob.check_inputs(task.run, setup, world, resume)
        for name, task in runs.items()
    }
    return setup, jobs


@dataclass(frozen=True)
class _AdapterJob:
    """An adapter to train, of the run or of one task, with everything known before loading."""

    config: RunConfig
    loaders: DataLoaders
    checkpoints: CheckpointManager
    resume_from: Path | None
    trained_on: list[BaseRequirement]
    phase_end: int

    @classmethod
    def check_inputs(cls, config: RunConfig, setup: ModelSetup, world: World, resume: str) -> Self:
        """Read the data, select the checkpoint to resume and prepare the layers for its step.

        Args:
            resume: as ``config.resume``.

        Raises:
            UserError: on every rank: unfit data, other data on another rank, or a checkpoint that
                does not exist or is of another run.
        """
        directory = Path(config.save.dir) / "checkpoints"
        checkpoints = CheckpointManager(
            directory,
            config.save.keep,
            world,
            asynchronous=config.save.asynchronous,
            keep_best=config.save.keep_best,
        )
        resume_from = checkpoints.select_checkpoint(resume)
        resumed = [] if resume_from is None else [resume_from]
        # first of all comparisons with the checkpoint, since it names the keys of config.json
        with world.raise_together("compare the base with that of the checkpoint"):
            trained_on = read_checkpoint_bases(resumed, setup.skeleton.index)
        loaders = read_run_inputs(config, setup, world, resume_from)
        check_loaders_fit_model(loaders, setup.skeleton, setup.adapter.num_extra_positions)
        with world.raise_together("prepare the layers"):
            done = 0 if resume_from is None else checkpoints.read_position(resume_from).step
            total = count_total_steps(config, loaders)
            phase_end = setup.adapter.prepare_phase(done, total)
            if phase_end < total:
                _check_phases(config)
        return cls(config, loaders, checkpoints, resume_from, trained_on, phase_end)

    def make_trainer(self, built: LoadedModel, call: nn.Module, world: World) -> Trainer:
        built = replace_labels(built, list_class_names(self.config.data))
        directory = Path(self.config.save.dir)
        return Trainer(
            self.config,
            *(world, built, call, self.loaders, self.checkpoints, directory),
            phase_end=self.phase_end,
        )


def _check_phases(config: RunConfig) -> None:
    """Refuse what does not go with a first phase that the method has chosen itself."""
    try:
        config.check_start("lora")
    except ValueError as error:
        raise UserError(str(error)) from None


def _run_trainer(
    trainer: Trainer, resume_from: Path | None, world: World, stop: Callable[[], bool]
) -> int | None:
    """Train to the last step, or to the end of a phase; return the exit code, or None."""
    first_step = (
        trainer.resume_from_checkpoint(resume_from)
        if resume_from is not None
        else trainer.start_run()
    )
    world.run_on_first(
        "write config.yaml", partial(write_run_config, trainer.run_dir, trainer.config)
    )
    done = trainer.run_training_loop(first_step, stop)
    if trainer.is_phase_over:
        log.info("step %d: the base is loaded again, in its own format", done)
        return None
    if trainer.stopped_early:
        log.info(
            "step %d: train.early_stop: %d evaluations without a better held-out %s",
            done,
            trainer.config.train.early_stop,
            trainer.config.train.metric_for_best,
        )
    elif done < trainer.total_steps or trainer.evaluation_stopped:
        text = "stopped on a signal after step %d; rerun the same command to resume"
        log.warning(text, done, extra=ONCE)
        return RESUMABLE
    with enter_phase("write the results", SETUP_PATIENCE):
        trainer.finish_run()
    return 0


def _train_tasks_sequentially(
    run_dir: Path,
    built: LoadedModel,
    trainers: dict[str, Trainer],
    resume_from: dict[str, Path | None],
    world: World,
    stop: Callable[[], bool],
) -> int:
    """Train the adapter of each task, all from the same initialization; return the exit code."""
    with world.raise_together("read tasks.json"):
        finished = TasksFile(run_dir)
    bank = AdapterBank(built)
    bank.store_active_adapter("start")
    for number, (name, trainer) in enumerate(trainers.items(), 1):
        newest = resume_from[name]
        steps = finished.get_finished_steps(name) if world.is_first else 0
        if (
            newest is not None
            and trainer.is_final_checkpoint(newest)
            and world.max_over_ranks(steps)[0]
        ):
            log.info("task %s is finished", name)
            continue
        log.info("task %s, %d of %d, in %s", name, number, len(trainers), trainer.run_dir)
        world.run_on_first("write tasks.json", partial(finished.mark_started, name))
        world.run_on_first(
            "make the task's directory", partial(make_run_directory, trainer.run_dir)
        )
        bank.activate_adapter("start")
        if _run_trainer(trainer, newest, world, stop):
            return RESUMABLE
        finish = partial(_finish_task, finished, name, trainer)
        world.run_on_first("write tasks.json", finish)
    return 0


def _finish_task(finished: TasksFile, name: str, trainer: Trainer) -> None:
    finished.mark_finished(name, trainer.make_report_summary())
