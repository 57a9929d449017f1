"""``dist-peft train``: the main job, in the order in which it happens."""

import argparse
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from dist_peft.adapters.base import TrainsBase
from dist_peft.adapters.peft_format import write_adapter
from dist_peft.app.build import Built, give_start, load, prepare, restore
from dist_peft.app.effects import warn_of_idle_options
from dist_peft.app.quantize import made_from, with_solved_base
from dist_peft.app.report import start_report
from dist_peft.app.rows import Loaders, check_fit, make_loaders
from dist_peft.app.solve import Stopped
from dist_peft.app.trained import write_trained_weights
from dist_peft.core.config import RunConfig
from dist_peft.core.config_io import dump_config, load_config
from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE, setup_log
from dist_peft.core.world import World
from dist_peft.engine import engine_kind
from dist_peft.export.verify import Probe
from dist_peft.model.attention import documents_are_isolated
from dist_peft.model.hub import public_name, save_tokenizer
from dist_peft.store.writer import atomic_write
from dist_peft.train.checkpoint import Checkpoints, RunPosition
from dist_peft.train.evaluate import HeldOut, evaluate, inference
from dist_peft.train.loop import StepResult, fit
from dist_peft.train.metrics import Metrics, StepMetrics, format_bytes, peak_memory_bytes
from dist_peft.train.optim import make_optimizer_factory
from dist_peft.train.progress import Progress
from dist_peft.train.report import RunSummary
from dist_peft.train.schedule import lr_factor

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
    with world.together("read the base's configuration"):
        prepared = prepare(config, world)
        config = prepared.config
        if world.is_first:
            _write_config(run_dir, config)
    warn_of_idle_options(config, world, prepared.model, device.type)
    loaders = make_loaders(config, prepared.tokenizer, world)
    check_fit(loaders, prepared.skeleton, prepared.adapter.extra_positions)
    checkpoints = Checkpoints(run_dir / "checkpoints", config.save.keep, world)
    with world.together("choose a checkpoint"):
        resume_from = checkpoints.choose(config.resume)
    if resume_from is not None:
        give_start(prepared, checkpoints, resume_from)
    built = load(prepared, config, world, device)
    factory = make_optimizer_factory(config.train, device)
    call = built.optimize(factory)
    session = _Session(config, world, built, call, loaders, checkpoints, run_dir)
    first_step = session.resume(resume_from) if resume_from is not None else session.begin()
    done = session.fit(first_step, stop)
    if done < session.total_steps:
        log.warning("stopped on a signal after step %d; start again to go on", done)
        return RESUMABLE
    session.finish()
    return 0


@dataclass
class _Session:
    """A loaded run between its first and its last step."""

    config: RunConfig
    world: World
    built: Built
    call: nn.Module
    loaders: Loaders
    checkpoints: Checkpoints
    run_dir: Path

    def __post_init__(self) -> None:
        c = self.config.train
        per_epoch = len(self.loaders.train.rows) / c.global_batch
        self.total_steps = c.steps or math.ceil(per_epoch * (c.epochs or 1.0))
        self.loaders.train.check_steps(self.total_steps)

    # -- start ---------------------------------------------------------------------------------

    def begin(self) -> int:
        """First start: describe the run, take the probe's logits before training."""
        log.info(
            "training %s parameters with %s on %d ranks (%s), %d steps of %d rows",
            f"{self.built.trained:,}",
            self.config.adapter.kind,
            self.world.size,
            engine_kind(self.config.engine, self.world),
            self.total_steps,
            self.config.train.global_batch,
        )
        if self.config.data.packing:
            self._check_isolation()
        logits = self._probe_logits()
        with self.world.together("write the probe"):
            if self.world.is_first:
                Probe(self.loaders.probe, logits, logits).save(self._probe_file)
        return 0

    def _check_isolation(self) -> None:
        with inference(self.built.model):
            if not documents_are_isolated(self.built.model, self.built.engine.device):
                raise UserError(
                    f"a {self.built.skeleton.config.model_type} model lets packed documents see "
                    "each other; set data.packing: false"
                )

    def resume(self, path: Path) -> int:
        """Load a checkpoint; gives the number of steps that are done."""
        position = self.checkpoints.position(path)
        self._check_same(path, position)
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

    def _check_same(self, path: Path, found: RunPosition) -> None:
        mine = self._position(found.step)
        for field, key in (("base", "base.*"), ("adapter", "adapter.*"), ("data", "data.*")):
            if getattr(found, field) != getattr(mine, field):
                raise UserError(
                    f"checkpoint {path} was made with another {key}"
                    f"{', train.global_batch or train.seed' if field == 'data' else ''}; "
                    "restore the configuration, or start afresh with resume: never"
                )

    # -- steps ---------------------------------------------------------------------------------

    def fit(self, first_step: int, stop: Callable[[], bool]) -> int:
        """Train to the end or to a signal; gives the number of steps done."""
        c = self.config.train
        before = self._evaluate(0) if first_step == 0 else None
        with self.world.together("open metrics"):
            metrics = Metrics(self.run_dir, self.world.rank, first_step)
        progress = Progress(
            self.total_steps, self.world.rank, first_step=first_step, every=c.log_every
        )
        with metrics, progress:

            def after_step(result: StepResult) -> bool:
                memory = peak_memory_bytes(self.built.engine.device)
                most, stopping = self.world.max(memory, stop())
                last = result.step == self.total_steps
                due = c.eval_every and result.step % c.eval_every == 0
                record = self._record(result, int(most))
                if (last or due) and (found := self._evaluate(result.step)) is not None:
                    record = replace(record, eval_loss=found.loss, eval_by_task=found.by_task)
                if result.step == 1 and before is not None:
                    record = replace(
                        record, eval_loss_before=before.loss, eval_by_task_before=before.by_task
                    )
                with self.world.together("write metrics"):
                    metrics.write(record)
                progress.update(record)
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
        path = self.checkpoints.save(state, self._position(step))
        log.info("saved %s", path)

    def _position(self, step: int) -> RunPosition:
        c = self.config
        data = c.data.model_dump(mode="json", exclude={"eval", "cache_dir"})
        return RunPosition(
            step=step,
            samples=step * c.train.global_batch,
            seed=c.train.seed,
            base=self.built.base_id,
            adapter=_digest(c.adapter.model_dump(mode="json")),
            data=_digest([data, c.train.global_batch, c.train.seed, c.train.shuffle]),
        )

    # -- end -----------------------------------------------------------------------------------

    def finish(self) -> None:
        """Gather what was trained, write it, complete the probe, write the report."""
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
        logits = self._probe_logits()
        with self.world.together("write what belongs to the adapter"):
            if self.world.is_first:
                self._write_beside(directory, logits)
        log.info("wrote %s and %s", directory, self.run_dir / "report.html")

    def _about(self) -> dict[str, Any]:
        return {
            "base": self.config.base.path,
            "base_fingerprint": self.built.skeleton.index.fingerprint(),
            "quant": self.config.base.model_dump(mode="json")["quant"],
            "start": getattr(self.config.adapter, "init", "default"),
            "dist_peft": importlib.metadata.version("dist_peft"),
            "torch": torch.__version__,
        }

    def _write_beside(self, directory: Path, logits: Tensor) -> None:
        """Tokenizer, probe, report."""
        if (template := self.loaders.chat_template) is not None:
            save_tokenizer(self.built.tokenizer, directory, template)
        if self._probe_file.is_file():
            before = Probe.load(self._probe_file).before
            Probe(self.loaders.probe, logits, before).save(self._probe_file)
        start_report(self.run_dir, self._summary())

    def _base_name(self) -> str:
        """Of a base that this project packed, the one that others can load."""
        origin = made_from(self.built.directory)
        return str(origin.get("base") or public_name(self.config.base))

    def _summary(self) -> RunSummary:
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
        """Logits of the probe tokens; every rank computes the same ones."""
        ids = self.loaders.probe.to(self.built.engine.device)
        with inference(self.built.model):
            return self.built.model(input_ids=ids, use_cache=False).logits.float().cpu()


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


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
