"""Train the points of a sweep: K training loops whose gradients are computed together.

Each point has the trainer, loaders, checkpoints and directory of an ordinary run. Its loop asks for
the gradients of a step, or for its held-out loss (``app.step_exchange``); when all loops have
asked, one pass over the base computes them all, and each loop continues with its update, metrics,
checkpoints::

    point 0   load | ........ | clip, update, record, evaluate, save |
    point 1        | load | . |                                      | clip, update, ...
    all                   | forward, backward of the joined batch |

A loop that has ended is left out of the next passes. Loops may be at different steps, as after a
kill between two checkpoints: each has its own.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from dist_peft.adapters.joined.method import JoinedAdapter
from dist_peft.app.adapter_job import AdapterJob, begin_training, end_training
from dist_peft.app.document_isolation import count_packed_tokens
from dist_peft.app.model_setup import (
    LoadedModel,
    ModelSetup,
    build_model,
    load_init_factors,
    load_weights,
)
from dist_peft.app.resolved_config import ResolvedConfig
from dist_peft.app.run_directory import RunDirectory, make_run_directory, write_run_config
from dist_peft.app.step_exchange import (
    ComputedGradients,
    HeldOutPass,
    StepBatches,
    StepGenerator,
    StepWork,
    compute_alone,
)
from dist_peft.app.sweep.halving import choose_stopped, read_held_out_losses
from dist_peft.app.sweep.point_model import make_point_model
from dist_peft.app.sweep.point_step import list_gathered_units, make_joined_step
from dist_peft.app.sweep.ranking import write_ranking
from dist_peft.app.sweep.sweep_file import PointState, SweepFile, open_sweep_file
from dist_peft.app.trainer import Trainer
from dist_peft.app.unused_options import warn_unused_options
from dist_peft.core.config.run import HalvingConfig
from dist_peft.core.errors import RunFailure, UserError
from dist_peft.core.stop_signals import RESUMABLE, StopRequested
from dist_peft.core.world import World
from dist_peft.data.loader import Loader
from dist_peft.engine import resolve_engine_kind
from dist_peft.export.outlook import log_export_outlook
from dist_peft.train.evaluate import EvalResult
from dist_peft.train.joined_evaluation import evaluate_together
from dist_peft.train.joined_step import AdapterWork, JoinedStep
from dist_peft.train.optimizers import make_optimizer_factory

__all__ = ["train_sweep"]

MOST_ON_ZERO = 32
"""Each point adds about ten calls to Python's stack, which is limited."""

log = logging.getLogger("dist_peft")


def train_sweep(
    resolved: ResolvedConfig,
    directory: RunDirectory,
    world: World,
    device: torch.device,
    stop: Callable[[], bool],
) -> int:
    """Check, load the base once, and train the adapters of all points; return the exit code.

    Raises:
        UserError: on every rank.
        RunFailure: on every rank: every point has failed.
    """
    config = resolved.run
    assert config.sweep is not None
    setup, jobs = _prepare_points(resolved, world, device)
    points = dict(zip(jobs, config.sweep.list_points(), strict=True))
    is_new = all(job.resume_from is None for job in jobs.values())
    records = open_sweep_file(directory.path, points, is_new, world)
    world.raise_if_stop_requested()
    directory.open()
    for job in jobs.values():  # those of any point: all have one start
        if job.resume_from is not None:
            load_init_factors(setup, job.checkpoints, job.resume_from)
            break
    trained_on = [base for job in jobs.values() for base in job.trained_on]
    built = load_weights(setup, world, device, trained_on)
    adapter = cast(JoinedAdapter, setup.adapter)
    units = list_gathered_units(built)
    runs = {
        number: _make_point_run(name, job, built, adapter, number, world, device)
        for number, (name, job) in enumerate(jobs.items())
    }
    runs[0].trainer.check_loaded_model()
    world.run_on_first("write config.yaml", partial(write_run_config, directory.path, config))
    world.run_on_first("write sweep.json", records.write)
    trainings = [run.trainer.training for run in runs.values()]
    step = make_joined_step(built, trainings, units, world)
    sweep = SweepLoop(runs, records, step, world, stop, config.sweep.halving)
    if not sweep.train_points():
        return RESUMABLE
    world.run_on_first("write the ranking", partial(write_ranking, directory.path, records))
    if all(record.state == "failed" for record in records.points.values()):
        raise RunFailure("every point of the sweep has failed; see log.txt and sweep.json")
    return 0


def _prepare_points(
    resolved: ResolvedConfig, world: World, device: torch.device
) -> tuple[ModelSetup, dict[str, AdapterJob]]:
    """Run every check that needs no weights; return the model on meta and the points' jobs."""
    config = resolved.run
    with world.raise_together("read the base's configuration"):
        points = resolved.split_points()
        if len(points) > MOST_ON_ZERO and resolve_engine_kind(config.engine, world) == "zero":
            raise UserError(
                f"sweep: {len(points)} points; engine.kind zero trains at most {MOST_ON_ZERO} at "
                "once, as each has a DeepSpeed engine that is called inside of those before; use "
                "engine.kind: fsdp2, or two sweeps"
            )
        setup = build_model(resolved, packed_tokens=count_packed_tokens(config))
    first = next(iter(points.values()))
    warn_unused_options(first.run, world, setup.model, device.type)
    adapters = cast(JoinedAdapter, setup.adapter).adapters
    log_export_outlook(first.run, adapters[0], setup.skeleton, setup.directory)
    jobs: dict[str, AdapterJob] = {}
    for (name, point), adapter in zip(points.items(), adapters, strict=True):
        own = ModelSetup(**{**vars(setup), "config": point.run, "adapter": adapter})
        jobs[name] = AdapterJob.check_inputs(point.run, own, world, config.resume)
    return setup, jobs


@dataclass
class PointRun:
    """A point that is trained.

    Attributes:
        steps: its loop; None before its begin and after its end.
        work: that it has asked for.
    """

    name: str
    trainer: Trainer
    resume_from: Path | None
    steps: StepGenerator | None = None
    work: StepWork | None = None


def _make_point_run(
    name: str,
    job: AdapterJob,
    built: LoadedModel,
    adapter: JoinedAdapter,
    number: int,
    world: World,
    device: torch.device,
) -> PointRun:
    setup = ModelSetup(
        **{**vars(built.setup), "config": job.config, "adapter": adapter.adapters[number]}
    )
    point = make_point_model(built, setup, number, adapter.shares)
    call = point.setup_optimizer(make_optimizer_factory(job.config.train, device))
    return PointRun(name, job.make_trainer(point, call, world, name), job.resume_from)


@dataclass
class SweepLoop:
    """The loops of all points, step by step.

    Attributes:
        runs: by number of the point.
        step: computes their gradients.
        is_stopped: a signal has ended the loop of a point before its last step.
    """

    runs: Mapping[int, PointRun]
    records: SweepFile
    step: JoinedStep
    world: World
    stop: Callable[[], bool]
    halving: HalvingConfig | None
    is_stopped: bool = False

    def train_points(self) -> bool:
        """Train all points that are not finished; return whether they are complete."""
        try:
            for run in self.runs.values():
                if not self._is_complete(run):
                    self._begin_point(run)
            while works := {k: run for k, run in self.runs.items() if run.work is not None}:
                evaluated = {k: r for k, r in works.items() if isinstance(r.work, HeldOutPass)}
                if evaluated:
                    self._evaluate_points(evaluated)
                else:
                    self._train_step(self._select_below_rung(works))
        except BaseException as error:
            self._close_loops(error)
            raise
        return not self.is_stopped

    def _is_complete(self, run: PointRun) -> bool:
        """Return whether an earlier process has ended the point for good; the same on all ranks."""
        state = self.records.points[run.name].state
        ended = self.world.is_first and state != "running" and run.resume_from is not None
        if state == "finished" and run.resume_from is not None:
            ended = ended and run.trainer.is_final_checkpoint(run.resume_from)
        if not self.world.any_rank(ended):
            return False
        log.info("%s is %s", run.name, state)
        if state == "halved" and run.resume_from is not None and self._lacks_adapter(run):
            run.trainer.resume_from_checkpoint(run.resume_from)
            self._finish_halved(run)
        return True

    def _lacks_adapter(self, run: PointRun) -> bool:
        missing = not (run.trainer.run_dir / "adapter").is_dir()
        return self.world.any_rank(self.world.is_first and missing)

    def _begin_point(self, run: PointRun) -> None:
        self.world.run_on_first(
            "make the point's directory", partial(make_run_directory, run.trainer.run_dir)
        )
        self._set_state(run, "running", 0)
        first = begin_training(run.trainer, run.resume_from, self.world)
        run.steps = run.trainer.iterate_steps(first, self.stop)
        self._advance(run, None)

    def _select_below_rung(self, works: Mapping[int, PointRun]) -> Mapping[int, PointRun]:
        """Return those of ``works`` that train the next step: points at a rung wait for the others,
        and where all have come to it, some stop."""
        if self.halving is None or self.is_stopped:
            return works
        rung = self.records.rung + self.halving.every
        below = {k: r for k, r in works.items() if r.trainer.training.num_steps < rung}
        if below:
            return below
        directories = {k: run.trainer.run_dir for k, run in works.items()}
        losses = read_held_out_losses(directories, rung, self.world)
        stopped = choose_stopped(self.halving, losses)
        # checkpoints, then the choice, then results: a killed sweep repeats missing parts
        for number in stopped:
            works[number].trainer.save_between_steps(rung)
        self._record(lambda file: file.set_halved([works[k].name for k in stopped], rung))
        for number in stopped:
            self._finish_halved(works[number])
        return {k: run for k, run in works.items() if k not in stopped}

    def _finish_halved(self, run: PointRun) -> None:
        if run.steps is not None:
            run.steps.close()
        run.steps = run.work = None
        record = self.records.points[run.name]
        log.info("%s ends at step %d, others continue (sweep.halving)", run.name, record.step)
        run.trainer.finish_run()

    def _train_step(self, works: Mapping[int, PointRun]) -> None:
        """Compute the gradients of all points that have asked, and let each continue."""
        begin, before = time.perf_counter(), self.step.engine.bytes_gathered
        asked = {
            k: AdapterWork(run.trainer.training.num_steps, *cast(StepBatches, run.work))
            for k, run in works.items()
        }
        if not self.step.can_join(asked):
            return self._train_apart(works)
        losses = self.step.accumulate_gradients(asked)
        if not self.step.engine.keeps_parts_in_range():
            return self._train_apart(works)
        seconds = time.perf_counter() - begin
        gathered = self.step.engine.bytes_gathered - before
        for number, run in works.items():
            mean, own = losses[number]
            run.trainer.training.accept_gradients(asked[number].batches, mean, own)
            self._advance(run, ComputedGradients(mean, seconds, gathered))

    def _train_apart(self, works: Mapping[int, PointRun]) -> None:
        """The same by passes of each point, one after another."""
        for number, run in works.items():
            with self.step.shares.give_all(number):
                found = compute_alone(cast(StepWork, run.work), run.trainer.training)
            self._advance(run, found)

    def _evaluate_points(self, works: Mapping[int, PointRun]) -> None:
        """Compute the held-out losses of all points that have asked, and let each continue."""
        found: Mapping[int, EvalResult | StopRequested]
        try:
            rows = {k: run.trainer.loaders.eval for k, run in works.items()}
            loaders = cast(Mapping[int, Loader[Any]], rows)  # no pass without held-out data
            compute = self.step.compute_statistics
            found = evaluate_together(self.step.model, loaders, compute, self.world)
        except StopRequested as error:
            found = dict.fromkeys(works, error)
        for number, run in works.items():
            self._advance(run, found[number])

    def _advance(self, run: PointRun, found: object) -> None:
        """Let a loop continue to the next work that it needs, or to its end.

        Args:
            found: result of the work that it asked for, or the error; None: it begins.
        """
        assert run.steps is not None
        run.work = None
        try:
            if isinstance(found, BaseException):
                run.work = run.steps.throw(found)
            else:
                run.work = next(run.steps) if found is None else run.steps.send(found)
        except StopIteration as end:
            run.steps = None
            self._end_point(run, end.value)
        except RunFailure as error:
            run.steps = None
            log.warning("%s has failed, others continue: %s", run.name, error)
            self._set_state(run, "failed", run.trainer.training.num_steps, str(error))

    def _end_point(self, run: PointRun, done: int) -> None:
        log.info("%s ends at step %d", run.name, done)
        if end_training(run.trainer, done):
            self.is_stopped = True
        else:
            self._set_state(run, "finished", done)

    def _set_state(self, run: PointRun, state: PointState, step: int, reason: str = "") -> None:
        self._record(lambda file: file.set_state(run.name, state, step, reason))

    def _record(self, change: Callable[[SweepFile], None]) -> None:
        """Change ``sweep.json`` from the first rank, and the records of the others."""
        self.world.run_on_first("write sweep.json", partial(change, self.records))
        if not self.world.is_first:
            change(self.records)

    def _close_loops(self, error: BaseException) -> None:
        """End the loops through their own cleanup, after an error outside of them."""
        for run in self.runs.values():
            if run.steps is not None:
                with suppress(BaseException):
                    run.steps.throw(error)
