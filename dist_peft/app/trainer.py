"""Train a loaded model: start or resume, run the steps, write the results."""

import importlib.metadata
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dist_peft.adapters.directory import write_adapter
from dist_peft.adapters.protocol import TrainsBase
from dist_peft.app.base_content import RECORD_FILE, lineage, made_from, record_text
from dist_peft.app.data_setup import Loaders
from dist_peft.app.final_weights import write_trained_weights
from dist_peft.app.finished_run import training_facts
from dist_peft.app.model_setup import Built, restore
from dist_peft.app.peft_form import report_peft_form
from dist_peft.app.run_identity import run_values, total_steps
from dist_peft.app.run_report import start_report
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import FILE_ONLY, ONCE
from dist_peft.core.world import World
from dist_peft.data.turn_end import turn_end_ids
from dist_peft.engine import engine_kind
from dist_peft.engine.replicas import ReplicaCheck
from dist_peft.export.stopping import warn_of_no_stop
from dist_peft.export.verify import Probe
from dist_peft.model.attention_mask import documents_are_isolated
from dist_peft.model.hub import public_name, save_tokenizer
from dist_peft.train.checkpoint import Checkpoints, RunPosition
from dist_peft.train.evaluate import HeldOut, evaluate, inference
from dist_peft.train.fusion_attention import FusionAttention, fusion_layers, measure_attention
from dist_peft.train.loop import StepResult, fit
from dist_peft.train.lr_schedule import lr_factor
from dist_peft.train.metrics import Metrics, format_bytes, peak_memory_bytes
from dist_peft.train.progress import Progress
from dist_peft.train.report import RunSummary
from dist_peft.train.step_metrics import StepMetrics

__all__ = ["Session"]

log = logging.getLogger("dist_peft")


@dataclass
class Session:
    """Training of one adapter on a loaded model.

    Attributes:
        built: the loaded model.
        call: module returned by ``Built.optimize``, called in training steps.
        run_dir: receives checkpoints, metrics, the adapter and the report.
    """

    config: RunConfig
    world: World
    built: Built
    call: nn.Module
    loaders: Loaders
    checkpoints: Checkpoints
    run_dir: Path

    def __post_init__(self) -> None:
        self.total_steps = total_steps(self.config, self.loaders)
        self.loaders.train.check_steps(self.total_steps)

    # -- start ---------------------------------------------------------------------------------

    def begin(self) -> int:
        """Start a new run at step 0: log a summary, save the probe logits before training."""
        log.info(
            "training %s parameters with %s on %d ranks (%s), %d steps of %d rows",
            f"{self.built.trained:,}",
            self.config.adapter.kind,
            self.world.size,
            engine_kind(self.config.engine, self.world),
            self.total_steps,
            self.config.train.global_batch,
        )
        ends = self._turn_end()
        names = self.built.tokenizer.convert_ids_to_tokens(ends)
        with self.world.together("read the base's generation settings"):
            if self.world.is_first:
                warn_of_no_stop(self.built.directory, ends, names)
        logits = self._probe_logits()
        with self.world.together("write the probe"):
            if self.world.is_first:
                Probe(self.loaders.probe, logits, logits).save(self._probe_file)
        return 0

    def check_model(self) -> None:
        """Run the check that needs loaded weights; called before anything is written.

        Raises:
            UserError: packed documents attend to each other (on every rank).
        """
        if self.config.data.packing:
            self._check_isolation()

    def _check_isolation(self) -> None:
        with inference(self.built.model):
            longest = self.config.data.seq_len
            if not documents_are_isolated(self.built.model, self.built.engine.device, longest):
                raise UserError(
                    f"a {self.built.skeleton.config.model_type} model lets packed documents see "
                    "each other; set data.packing: false"
                )

    def ends_at(self, path: Path) -> bool:
        """Return whether checkpoint ``path`` is at or after the last step of this run."""
        return self.checkpoints.position(path).step >= self.total_steps

    def resume(self, path: Path) -> int:
        """Load a checkpoint that ``app.resuming`` has accepted; return its number of steps."""
        position = self.checkpoints.position(path)
        restore(self.built, self.checkpoints, path, position.step)
        log.info("resumed %s at step %d", path, position.step)
        with self.world.together("read the probe"):
            if self._probe_file.is_file():
                Probe.load(self._probe_file)
            else:
                log.warning(
                    "%s is missing: exports cannot be verified", self._probe_file, extra=ONCE
                )
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

    def fit(self, first_step: int, stop: Callable[[], bool]) -> int:
        """Train to the last step or until ``stop()``; return the number of completed steps."""
        c = self.config.train
        before = self._evaluate(0) if first_step == 0 else None
        replicas = ReplicaCheck(self.built.model, self.built.engine, self.world)
        if c.check_every:
            self._compare_replicas(replicas, first_step, everything=True)
        with self.world.together("open metrics"):
            metrics = Metrics(self.run_dir, self.world.rank, first_step)
        progress = Progress(
            self.total_steps,
            self.world.rank,
            first_step=first_step,
            every=c.log_every,
            unit="rows" if self.config.data.classifies else "tok",
        )
        with metrics, progress:

            def after_step(result: StepResult) -> bool:
                memory = peak_memory_bytes(self.built.engine.device)
                most, stopping = self.world.max(memory, stop())
                last = result.step == self.total_steps
                due = c.eval_every and result.step % c.eval_every == 0
                record = self._record(result, int(most))
                if (last or due) and (found := self._evaluate(result.step)) is not None:
                    record = replace(record, **found.values())
                if result.step == 1 and before is not None:
                    record = replace(record, **before.values("_before"))
                with self.world.together("write metrics"):
                    metrics.write(record)
                progress.update(record)
                if c.check_every and result.step % c.check_every == 0:
                    self._compare_replicas(replicas, result.step)
                every = self.config.save.every
                if last or stopping or (every and result.step % every == 0):
                    self._save(result.step)
                return bool(stopping)

            return fit(
                self.built.model,
                self.built.engine,
                self.built.adapter,
                self.loaders.train,
                self.world,
                call=self.call,
                first_step=first_step,
                last_step=self.total_steps,
                lr_at=self._lr_at,
                max_grad_norm=c.max_grad_norm,
                after_step=after_step,
            )

    def _compare_replicas(
        self, replicas: ReplicaCheck, step: int, everything: bool = False
    ) -> None:
        """Check that all ranks hold equal replicated state; log bytes and seconds."""
        before = replicas.seconds
        facts = {
            "step": step,
            "train.lr": self._lr_at(step),
            "order of rows": self.loaders.train.rows_of_step(step),
            "contents of data.train": self.loaders.inputs["contents of data.train"],
        }
        replicas.compare(facts, everything=everything)
        if self.world.size > 1:
            log.info(
                "step %d: ranks hold equal copies (%.1f MiB compared in %.3f s; train.check_every)",
                step,
                replicas.bytes_hashed / 2**20,
                replicas.seconds - before,
                extra=None if everything else FILE_ONLY,
            )

    def _lr_at(self, step: int) -> float:
        c = self.config.train
        return c.lr * lr_factor(step, self.total_steps, c.warmup, c.schedule, c.min_lr_ratio)

    def _record(self, result: StepResult, memory: int) -> StepMetrics:
        samples = result.step * self.config.train.global_batch
        return StepMetrics(
            step=result.step,
            loss=result.loss,
            lr=result.lr,
            grad_norm=result.grad_norm,
            tokens=result.tokens,
            tokens_per_s=result.tokens / result.seconds,
            mem_peak=memory,
            bytes_gathered=result.bytes_gathered,
            epoch=samples / len(self.loaders.train.rows),
            samples=samples,
            seconds=result.seconds,
        )

    def _evaluate(self, step: int) -> HeldOut | None:
        if self.loaders.eval is None:
            return None
        found = evaluate(self.built.model, self.built.engine, self.loaders.eval, self.world)
        log.info("step %d: held-out loss %s", step, found)
        return found

    def _save(self, step: int) -> None:
        state = self.built.engine.state(self.built.model)
        for name in self.built.adapter.start_state():
            state[f"start/{name}"] = self.built.engine.gather(self.built.parameter(name))
        files = {RECORD_FILE: record_text(self.built.record)}
        path = self.checkpoints.save(state, self._position(step), files)
        log.info("saved %s", path)

    def _position(self, step: int) -> RunPosition:
        return RunPosition(
            step=step,
            samples=step * self.config.train.global_batch,
            seed=self.config.train.seed,
            base=self.built.base_id,
            values=run_values(self.config, self.built, self.loaders, self.world),
        )

    # -- end -----------------------------------------------------------------------------------

    def finish(self) -> None:
        """Gather and save the trained adapter, complete the probe, write the report."""
        directory = self.run_dir / "adapter"
        if isinstance(self.built.adapter, TrainsBase):
            about = {"kind": self.config.adapter.kind, **self._about()}
            write_trained_weights(self.built, self.world, directory, about)
        else:
            tensors = self.built.gather_adapter()
            with self.world.together("write the adapter"):
                if self.world.is_first:
                    public = self.built.adapter.to_public(tensors, self._base_name())
                    write_adapter(directory, public, self._about())
        logits, attention = self._probe_logits(), self._fusion_attention()
        with self.world.together("write tokenizer, probe and report"):
            if self.world.is_first:
                if attention is not None:
                    attention.write(self.run_dir)
                self._write_beside(directory, logits)
                report_peft_form(self.config, self.built, self.run_dir)
        log.info("wrote %s and %s", directory, self.run_dir / "report.html")

    def _about(self) -> dict[str, Any]:
        head = self.built.skeleton.head
        return {
            **({} if head is None else {"labels": head.labels}),
            **self.built.record.metadata(),
            **lineage(self.built.skeleton),
            **training_facts(self.config),
            "start": getattr(self.config.adapter, "init", "default"),
            "turn_end": self._turn_end(),
            "dist_peft": importlib.metadata.version("dist_peft"),
            "torch": torch.__version__,
        }

    def _turn_end(self) -> list[int]:
        """Return the ids of the tokens that end the turns in the training data."""
        rows, tokenizer = self.loaders.train.rows, self.built.tokenizer
        if self.config.data.classifies:
            return []
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        return turn_end_ids(cast(Any, rows), special)

    def _write_beside(self, directory: Path, logits: Tensor) -> None:
        """Write the chat template's tokenizer, the completed probe and the report."""
        if (template := self.loaders.chat_template) is not None:
            save_tokenizer(self.built.tokenizer, directory, template)
        if self._probe_file.is_file():
            before = Probe.load(self._probe_file).before
            Probe(self.loaders.probe, logits, before).save(self._probe_file)
        start_report(self.run_dir, self.summary())

    def _fusion_attention(self) -> FusionAttention | None:
        """Return a fusion's attention on held-out data; None without fusion or held-out data."""
        layers, rows = fusion_layers(self.built.model), self.loaders.eval
        if not layers or rows is None:
            return None
        return measure_attention(self.built.model, layers, self.built.engine, rows, self.world)

    def _base_name(self) -> str:
        """Return the base's public name; of a packed base, that of its unquantized origin."""
        origin = made_from(self.built.directory)
        return str(origin.get("base") or public_name(self.config.base))

    def summary(self) -> RunSummary:
        """Return the facts that the report shows in addition to the metrics."""
        kind = engine_kind(self.config.engine, self.world)
        return RunSummary.of(
            self.config,
            engine=kind,
            ranks=self.world.size,
            facts=[
                ("Trained parameters", f"{self.built.trained:,}"),
                ("Model as stored, all ranks", format_bytes(self.built.stored_bytes)),
                ("Read from the base by rank 0", format_bytes(self.built.bytes_read)),
            ],
        )

    @property
    def _probe_file(self) -> Path:
        return self.run_dir / "probe.safetensors"

    def _probe_logits(self) -> Tensor:
        """Return logits of the probe tokens; every rank computes the same ones."""
        ids = self.loaders.probe.to(self.built.engine.device)
        with inference(self.built.model):
            return self.built.model(input_ids=ids, use_cache=False).logits.float().cpu()
