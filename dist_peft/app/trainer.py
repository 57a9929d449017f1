"""Train a loaded model: start or resume, run the steps, write the results."""

import logging
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from dist_peft.app.adapter_training import AdapterTraining
from dist_peft.app.base_content import RECORD_FILE, format_base_record
from dist_peft.app.checkpoint_adapter import format_adapter_files
from dist_peft.app.data_setup import DataLoaders
from dist_peft.app.document_isolation import check_document_isolation
from dist_peft.app.model_setup import LoadedModel, load_training_state
from dist_peft.app.peft_form_report import report_peft_form
from dist_peft.app.run_chain import RunChain
from dist_peft.app.run_identity import describe_run_values
from dist_peft.app.run_report import summarize_run, write_run_report
from dist_peft.app.run_samples import RunSamples
from dist_peft.app.step_exchange import HeldOutPass, StepBatches, StepGenerator, run_alone
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import RunFailure
from dist_peft.core.log import FILE_ONLY, ONCE
from dist_peft.core.stop_signals import StopRequested
from dist_peft.core.world import World
from dist_peft.engine import resolve_engine_kind
from dist_peft.engine.replicas import ReplicaCheck
from dist_peft.export.stopping import warn_missing_stop_token
from dist_peft.train.attention_record import FusionAttention
from dist_peft.train.checkpoint import CheckpointManager, RunPosition
from dist_peft.train.eval_history import EvaluationHistory, open_metrics
from dist_peft.train.evaluate import EvalResult, add_evaluation
from dist_peft.train.fusion_attention import find_fusion_layers, measure_attention
from dist_peft.train.lr_schedule import compute_lr_factor
from dist_peft.train.metrics import MetricsWriter
from dist_peft.train.nonfinite import FailedStep, NonFiniteSteps, SequenceDescriber
from dist_peft.train.progress import ProgressDisplay
from dist_peft.train.rank_load import StepLoad
from dist_peft.train.run_lock import raise_if_taken_over
from dist_peft.train.run_state import note_step
from dist_peft.train.run_summary import RunSummary
from dist_peft.train.spikes import SpikeDetector
from dist_peft.train.step_metrics import StepMetrics
from dist_peft.train.trackers import list_tracker_sinks

__all__ = ["Trainer"]

log = logging.getLogger("dist_peft")


@dataclass
class Trainer:
    """Training of one adapter on a loaded model.

    Attributes:
        built: the loaded model.
        call: module returned by ``LoadedModel.setup_optimizer``, called in training steps.
        run_dir: receives checkpoints, metrics, the adapter and the report.
        phase_end: after how many steps the base is loaded again in another form; None: never.
    """

    config: RunConfig
    world: World
    built: LoadedModel
    call: nn.Module
    loaders: DataLoaders
    checkpoints: CheckpointManager
    run_dir: Path
    phase_end: int | None = None
    name: str = ""
    """Shown before its lines, where a process trains several."""

    def __post_init__(self) -> None:
        self.training = AdapterTraining(
            self.config, self.world, self.built, self.call, self.loaders
        )
        self.total_steps = self.training.plan_steps()
        self.stopped_early = False
        """Whether ``train.early_stop`` has ended the training."""
        self.probe = self.training.probe
        self.samples = RunSamples(self.config, self.loaders, self.built, self.world)
        self.nonfinite = NonFiniteSteps.from_config(self.config.train)
        self.evaluation_stopped = False
        """Whether a signal has ended the evaluation after the last step."""
        self.chain = RunChain(self.config, self.built.setup, self.loaders, self.world)
        self.is_phase_over = False
        """Whether the steps up to ``phase_end`` are done, and no signal asks to stop."""

    # -- start ---------------------------------------------------------------------------------

    def start_run(self) -> int:
        """Start a new run at step 0: log a summary, save the probe logits before training."""
        log.info(
            "training %s parameters with %s on %d ranks (%s), %d steps of %d sequences",
            f"{self.built.trained:,}",
            self.config.adapter.kind,
            self.world.size,
            resolve_engine_kind(self.config.engine, self.world),
            self.total_steps,
            self.config.train.global_batch,
        )
        ends = self.training.turn_end_ids
        names = self.built.setup.tokenizer.convert_ids_to_tokens(ends)
        warn = partial(warn_missing_stop_token, self.built.setup.directory, ends, names)
        self.world.run_on_first("read the base's generation settings", warn)
        self.probe.save_untrained()
        self.chain.begin(None)
        return 0

    def check_loaded_model(self) -> None:
        """Run the check that needs loaded weights; called before anything is written.

        Raises:
            UserError: packed documents attend to each other (on every rank).
        """
        check_document_isolation(self.built, self.config)

    def is_final_checkpoint(self, path: Path) -> bool:
        """Return whether checkpoint ``path`` is at or after the last step of this run."""
        return self.checkpoints.read_position(path).step >= self.total_steps

    def resume_from_checkpoint(self, path: Path) -> int:
        """Load a checkpoint that ``app.resuming`` has accepted; return its number of steps."""
        position = self.checkpoints.read_position(path)
        skipped, halvings = position.nonfinite_steps, position.lr_halvings
        load_training_state(self.built, self.checkpoints, path, position.step, skipped)
        self.nonfinite = replace(self.nonfinite, steps=list(skipped), num_halvings=halvings)
        log.info("resumed %s at step %d", path, position.step)
        note_step(position.step)  # a killed run may not have recorded its last ones
        self.probe.restore()
        self.chain.begin(path)
        if position.step >= self.total_steps:
            log.warning(
                "%s has %d steps and train.steps is %d: nothing is left to train",
                path,
                position.step,
                self.total_steps,
                extra=ONCE,
            )
        return position.step

    # -- steps ---------------------------------------------------------------------------------

    def run_training_loop(self, first_step: int, stop: Callable[[], bool]) -> int:
        """Train to the last step or until ``stop()``; return the number of completed steps."""
        return run_alone(self.iterate_steps(first_step, stop), self.training)

    def iterate_steps(self, first_step: int, stop: Callable[[], bool]) -> StepGenerator:
        """The loop of ``run_training_loop``, which yields the work of each step."""
        train, engine, loader = self.config.train, self.built.engine, self.loaders.train
        before = (yield from self._evaluate_held_out(0)) if first_step == 0 else None
        self.samples.generate_before(first_step)
        replicas = ReplicaCheck(self.built.model, engine, self.world)
        if train.check_every:
            self._compare_replicas(replicas, first_step, everything=True)
        training = self.training
        training.num_steps = first_step
        metrics = self._open_metrics(first_step)
        history = EvaluationHistory(train.early_stop, train.metric_for_best)
        history.read_from_run(self.run_dir, self.world)
        self.stopped_early = history.should_stop
        if self.stopped_early:
            return first_step
        spikes = SpikeDetector.read_from_run(self.run_dir, train.spike_score, self.world)
        progress = self._make_progress_display(first_step)
        with metrics, progress, closing(training), self.checkpoints.writes_finished():
            for step in range(first_step, self.total_steps):
                start, load = time.perf_counter(), StepLoad(engine.device, self.world)
                batches, targets = loader.load_step(step)
                loaded = time.perf_counter() - start
                loss, computed, gathered = yield StepBatches(batches, targets)
                start, gathered = time.perf_counter(), gathered - engine.bytes_gathered
                lr = self._compute_lr(step)
                failed = partial(self._handle_failed_step, is_saved=step == first_step)
                norm = training.optim_step(lr, on_failure=failed)
                seconds = loaded + computed + time.perf_counter() - start
                gathered += engine.bytes_gathered
                done, last = step + 1, step + 1 == self.total_steps
                # one exchange a step: a signal to one rank stops all of them
                stopping, is_failed, *maxima = self.world.max_over_ranks(
                    stop(), self.checkpoints.has_failed, *load.list_exchanged()
                )
                if is_failed:
                    self.checkpoints.finish_writing()  # raises the error of the writer thread
                record = StepMetrics(
                    step=done,
                    loss=loss,
                    lr=lr,
                    grad_norm=norm,
                    tokens=targets,
                    tokens_per_s=targets / seconds,
                    bytes_gathered=gathered,
                    epoch=done * train.global_batch / loader.rows_per_epoch,
                    samples=done * train.global_batch,
                    seconds=seconds,
                    nonfinite_steps=len(self.nonfinite.steps) or None,
                    spike=spikes.log_loss(done, loss),
                    **load.describe_maxima(maxima, loader.count_share_targets(step), seconds),
                    **training.parts.method_metrics,
                )
                is_best = False
                if last or _is_due(done, train.eval_every):
                    found = yield from self._evaluate_held_out(done)
                    record = add_evaluation(record, found)
                    is_best = found is not None and history.add_evaluation(found)
                if step == 0:
                    record = self.samples.add_before(add_evaluation(record, before, "_before"))
                record = self.samples.add_after(record, is_end=last or history.should_stop)
                with self.world.raise_together("write metrics"):
                    raise_if_taken_over()
                    metrics.write_step(record)
                    note_step(done)
                self.chain.add_record(record)
                progress.show_step(record)

                if _is_due(done, train.check_every):
                    self._compare_replicas(replicas, done)
                is_best = is_best and self.config.save.keep_best
                self.stopped_early = history.should_stop
                stopping = stopping or self.evaluation_stopped
                self.is_phase_over = done == self.phase_end and not (last or stopping)
                ending = last or stopping or self.stopped_early or self.is_phase_over
                if ending or is_best or _is_due(done, self.config.save.every):
                    self._save_checkpoint(done, history.best if is_best else None)
                if ending:
                    return done
        return first_step

    def _handle_failed_step(self, failed: FailedStep, *, is_saved: bool) -> None:
        """Count a step that was not finite, or end the run with the steps before it saved.

        Raises:
            RunFailure: on every rank: the run ends.
        """
        decode = partial(self.built.setup.tokenizer.decode, skip_special_tokens=False)
        describer = SequenceDescriber(self.loaders.train.rows, cast(Any, decode))
        try:
            self.nonfinite.handle_step(failed, self.world, self.run_dir, describer)
        except RunFailure:
            if not is_saved and not _is_due(failed.step - 1, self.config.save.every):
                self._save_checkpoint(failed.step - 1, None)
            raise

    def _make_progress_display(self, first_step: int) -> ProgressDisplay:
        return ProgressDisplay(
            self.total_steps,
            self.world.rank,
            first_step=first_step,
            every=self.config.train.log_every,
            unit=self.loaders.objective.target_unit,
            name=self.name,
        )

    def _compare_replicas(
        self, replicas: ReplicaCheck, step: int, everything: bool = False
    ) -> None:
        """Check that all ranks hold equal replicated state; log bytes and seconds."""
        before = replicas.seconds
        facts = {
            "step": step,
            "train.lr": self._compute_lr(step),
            "order of rows": self.loaders.train.list_step_rows(step),
            "contents of data.train": self.loaders.inputs["contents of data.train"],
        }
        replicas.compare_replicas(facts, everything=everything)
        if self.world.size > 1:
            log.info(
                "step %d: ranks hold equal copies (%.1f MiB compared in %.3f s; train.check_every)",
                step,
                replicas.bytes_hashed / 2**20,
                replicas.seconds - before,
                extra=None if everything else FILE_ONLY,
            )

    def _compute_lr(self, step: int) -> float:
        c = self.config.train
        factor = compute_lr_factor(step, self.total_steps, c.warmup, c.schedule, c.min_lr_ratio)
        return c.lr * factor * self.nonfinite.lr_factor

    def _open_metrics(self, first_step: int) -> MetricsWriter:
        due = first_step == self.total_steps or _is_due(first_step, self.config.train.eval_every)
        evaluate = partial(self._evaluate_alone, first_step) if first_step and due else None
        described = self.config.dump_stored_tree()
        trackers = list_tracker_sinks(self.config.save.track, self.run_dir, described)
        return open_metrics(
            self.run_dir, first_step, self.world, self.world.rank, evaluate, trackers
        )

    def _evaluate_alone(self, step: int) -> EvalResult | None:
        return run_alone(self._evaluate_held_out(step), self.training)

    def _evaluate_held_out(self, step: int) -> Generator[HeldOutPass, Any, EvalResult | None]:
        """Return the held-out loss; None without held-out data, or stopped by a signal."""
        if self.loaders.eval is None:
            return None
        try:
            found: EvalResult = yield HeldOutPass(step)
        except StopRequested:
            if step == 0:
                raise  # there is nothing to save
            text = "step %d: the evaluation was stopped; a resume repeats it"
            log.warning(text, step, extra=ONCE)
            self.evaluation_stopped = True
            return None
        name = self.name and f"{self.name}, "
        log.info("%sstep %d: held-out loss %s", name, step, found)
        return found

    def _save_checkpoint(self, step: int, best: tuple[str, float] | None) -> None:
        state = dict(self.built.engine.training_state_shards(self.built.model))
        for name in self.built.setup.adapter.list_init_factors():
            state[f"start/{name}"] = self.built.engine.gather_parameter(
                self.built.get_parameter(name)
            )
        files = {RECORD_FILE: format_base_record(self.built.record, self.config.base.quant)}
        files |= format_adapter_files(self.training.make_metadata(), self.loaders.chat_template)
        position = self._make_run_position(step)
        seal = self.chain.make_seal(position)
        self.checkpoints.save_checkpoint(state, position, files, best=best, seal=seal)

    def _make_run_position(self, step: int) -> RunPosition:
        return RunPosition(
            step=step,
            samples=step * self.config.train.global_batch,
            seed=self.config.train.seed,
            base=self.built.setup.base_id,
            values=describe_run_values(self.config, self.built.setup, self.loaders, self.world),
            nonfinite_steps=list(self.nonfinite.steps),
            lr_halvings=self.nonfinite.num_halvings,
        )

    # -- end -----------------------------------------------------------------------------------

    def save_between_steps(self, step: int) -> None:
        """Write the checkpoint of ``step``, the last that is done."""
        self._save_checkpoint(step, None)

    def finish_run(self) -> None:
        """Gather and save the trained adapter, complete the probe, write the report."""
        directory = self.run_dir / "adapter"
        self.training.write_adapter(directory)
        logits, attention = self.probe.compute_logits(), self._measure_fusion_attention()

        def write_after_adapter() -> None:
            if attention is not None:
                attention.write_json(self.run_dir)
            self._complete_probe_and_report(logits)
            report_peft_form(self.config, self.built, self.run_dir)
            self.chain.seal_adapter(directory)

        self.world.run_on_first("write probe and report", write_after_adapter)
        log.info("wrote %s and %s", directory, self.run_dir / "report.html")

    def _complete_probe_and_report(self, logits: Tensor) -> None:
        self.probe.add_trained_logits(logits)
        write_run_report(self.run_dir, self.make_report_summary())

    def _measure_fusion_attention(self) -> FusionAttention | None:
        """Return a fusion's attention on held-out data; None without fusion or held-out data."""
        layers, rows = find_fusion_layers(self.built.model), self.loaders.eval
        if not layers or rows is None:
            return None
        return measure_attention(
            self.built.model, layers, self.built.engine, self.loaders.objective, rows, self.world
        )

    def make_report_summary(self) -> RunSummary:
        """Return the facts that the report shows in addition to the metrics."""
        return summarize_run(self.config, self.built, self.loaders, self.world)


def _is_due(step: int, every: int) -> bool:
    """Return whether ``step`` is a multiple of ``every``; 0 means never."""
    return every > 0 and step % every == 0
