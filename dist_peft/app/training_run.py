"""Train the adapters of a run, in execution order: check, quantize, load, train, write."""

import gc
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from dist_peft.app.adapter_bank import AdapterBank
from dist_peft.app.adapter_job import AdapterJob, begin_training, end_training
from dist_peft.app.document_isolation import count_packed_tokens
from dist_peft.app.earlier_log import append_to_earlier_log
from dist_peft.app.model_setup import (
    LoadedModel,
    ModelSetup,
    build_model,
    load_init_factors,
)
from dist_peft.app.python_api import load_with_adapter
from dist_peft.app.quantized_base import ensure_solved_base, must_solve_base
from dist_peft.app.rank_setup import download_base_once
from dist_peft.app.resolved_config import ResolvedConfig, resolve_config, resolve_unsolved_run
from dist_peft.app.run_directory import RunDirectory, make_run_directory, write_run_config
from dist_peft.app.sweep.sweep_file import check_directory_kind
from dist_peft.app.sweep.sweep_run import train_sweep
from dist_peft.app.tasks import TasksFile
from dist_peft.app.trainer import Trainer
from dist_peft.app.unused_options import warn_unused_options
from dist_peft.core.config.run import RunConfig
from dist_peft.core.log import setup_log
from dist_peft.core.stop_signals import RESUMABLE, StopRequested
from dist_peft.core.world import World
from dist_peft.export.outlook import log_export_outlook
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
    check_kind = partial(check_directory_kind, run_dir, config.sweep is not None)
    world.run_on_first("look at the run directory", check_kind)
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
    if resolved.run.sweep is not None:
        return train_sweep(resolved, directory, world, device, stop)
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
) -> "tuple[ModelSetup, dict[str, AdapterJob]]":
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
        name: AdapterJob.check_inputs(task.run, setup, world, resume) for name, task in runs.items()
    }
    return setup, jobs


def _run_trainer(
    trainer: Trainer, resume_from: Path | None, world: World, stop: Callable[[], bool]
) -> int | None:
    """Train to the last step, or to the end of a phase; return the exit code, or None."""
    first_step = begin_training(trainer, resume_from, world)
    return end_training(trainer, trainer.run_training_loop(first_step, stop))


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
