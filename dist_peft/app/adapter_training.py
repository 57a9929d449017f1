"""A loaded model with an adapter that is being trained: gradients, updates, and its files.

``dist-peft train`` (``app.trainer``) and the Python API (``app.python_api``) both train with it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dist_peft.adapters.directory import write_adapter_directory
from dist_peft.adapters.protocol import TrainsBaseWeights
from dist_peft.app.checkpoint_adapter import describe_adapter
from dist_peft.app.data_setup import DataLoaders
from dist_peft.app.final_weights import write_trained_weights
from dist_peft.app.model_card import ADAPTER, write_model_card
from dist_peft.app.model_setup import LoadedModel
from dist_peft.app.output_places import refuse_taken_place
from dist_peft.app.run_directory import make_run_directory, write_run_config
from dist_peft.app.run_identity import count_total_steps
from dist_peft.app.run_probe import RunProbe
from dist_peft.app.run_report import find_public_base_name
from dist_peft.app.step_setup import make_training_step
from dist_peft.core.closing import ClosedAtExit
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import RunFailure, UserError
from dist_peft.core.world import World
from dist_peft.data.loader import Batch
from dist_peft.data.packing import IGNORE
from dist_peft.data.turn_end import find_turn_end_ids
from dist_peft.model.hub import save_tokenizer
from dist_peft.store.publish import publish_directory
from dist_peft.train.evaluate import inference_mode
from dist_peft.train.loop import TrainingStep
from dist_peft.train.nonfinite import FailedStep

__all__ = ["AdapterTraining"]

PROBE_FILE = "probe.safetensors"


@dataclass
class AdapterTraining(ClosedAtExit):
    """A loaded model, its adapter and its optimizer. Every method is a collective: all ranks call
    it.

    Attributes:
        config: of the run; ``config.train`` has the defaults of ``optim_step``.
        world: the ranks.
        built: the loaded model.
        call: module returned by ``LoadedModel.setup_optimizer``, called in training steps.
        loaders: batches of the data of ``config``.
        num_steps: steps that are done.
    """

    config: RunConfig
    world: World
    built: LoadedModel
    call: nn.Module
    loaders: DataLoaders
    num_steps: int = 0
    _parts: TrainingStep | None = field(default=None, init=False)
    _pending: "tuple[Sequence[Batch], float] | None" = field(default=None, init=False)

    # -- steps -------------------------------------------------------------------------------------

    def plan_steps(self) -> int:
        """Make adapter and objective ready for the steps of ``config``; return their number.

        Raises:
            UserError: a step has no sequences.
        """
        total = count_total_steps(self.config, self.loaders)
        self.loaders.train.check_steps(total)
        self.built.setup.adapter.plan_steps(total)
        self.loaders.objective.begin_run(total)
        return total

    def load_batches(self, step: int) -> tuple[list[Batch], int]:
        """Return this rank's micro-batches of step ``step`` (from 0) of ``data.train``, and the
        number of targets of the whole step."""
        return self.loaders.train.load_step(step)

    def forward_backward(self, batches: Sequence[Batch], targets: int | None = None) -> float:
        """Compute the loss and its gradient, which is summed over micro-batches and ranks.

        Args:
            batches: this rank's micro-batches; at least one, equally many on every rank.
            targets: number of targets over all ranks; None: the labels are counted.

        Returns:
            The mean loss over the targets in nats, the same on every rank.

        Raises:
            UserError: no batches, or gradients that no ``optim_step`` has used.
        """
        if not batches:
            raise UserError("forward_backward needs at least one batch")
        if self._pending is not None:
            raise UserError(
                "forward_backward was called twice; an optim_step belongs between: pass all "
                "micro-batches of a step at once"
            )
        if targets is None:
            own = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
            targets = int(self.world.sum_over_ranks(own)[0])
        loss = self.parts.accumulate_gradients(self.num_steps, batches, targets)
        self._pending = batches, loss
        return loss

    def accept_gradients(
        self, batches: Sequence[Batch], loss: float, losses: Sequence[Tensor]
    ) -> None:
        """Take over gradients that were computed together with those of other adapters.

        Args:
            loss: mean over the targets of the step.
            losses: summed losses of ``batches``.
        """
        self.parts.losses[:] = losses
        self._pending = batches, loss

    def optim_step(
        self,
        lr: float | None = None,
        max_grad_norm: float | None = None,
        *,
        on_failure: Callable[[FailedStep], object] | None = None,
    ) -> float:
        """Clip the gradients and update the adapter; return their norm before clipping.

        Args:
            lr: learning rate; None: ``train.lr``.
            max_grad_norm: bound of the norm; None: ``train.max_grad_norm``.
            on_failure: called where the norm is not finite, and nothing was updated; None: that is
                an error.

        Raises:
            UserError: there are no gradients.
            RunFailure: on every rank: the loss or the gradient is not finite.
        """
        if self._pending is None:
            raise UserError("optim_step needs the gradients of a forward_backward before it")
        (batches, loss), self._pending = self._pending, None
        lr = self.config.train.lr if lr is None else lr
        bound = self.config.train.max_grad_norm if max_grad_norm is None else max_grad_norm
        step = self.num_steps
        norm = self.parts.update_parameters(step, loss, lr, bound)
        if not math.isfinite(norm):
            if on_failure is None:
                raise RunFailure(f"step {step + 1}: the gradient is not finite, of loss {loss:g}")
            on_failure(self.parts.describe_failure(step, batches, loss, norm, lr))
        self.parts.finish_step(step + 1)
        self.num_steps = step + 1
        return norm

    @property
    def parts(self) -> TrainingStep:
        """Forward, backward and update of a step."""
        if self._parts is None:
            self._parts = make_training_step(
                self.config.train, self.built, self.call, self.loaders.objective, self.world
            )
        return self._parts

    def compute_logits(self, input_ids: Tensor) -> Tensor:
        """Return the logits of ``input_ids`` ``[B, S]``, float32 ``[B, S, V]`` on the CPU."""
        with inference_mode(self.built.model), torch.no_grad():
            ids = input_ids.to(self.built.engine.device)
            return (
                cast(Tensor, self.built.model(input_ids=ids, use_cache=False).logits).float().cpu()
            )

    # -- files -------------------------------------------------------------------------------------

    @cached_property
    def probe(self) -> RunProbe:
        """Tokens whose logits before and after training verify a merge or export."""
        path = Path(self.config.save.dir) / PROBE_FILE
        return RunProbe(path, self.loaders.probe, self.built, self.world)

    def save(self, directory: str | Path | None = None) -> Path:
        """Write a run directory that ``merge_run`` and ``export_run`` read, and return its path.

        It holds ``config.yaml``, ``adapter/`` and the probe; neither checkpoints nor metrics.

        Args:
            directory: new; None: ``save.dir``.

        Raises:
            UserError: on every rank: a run or model is there already, or the disk is full.
        """
        run_dir = Path(self.config.save.dir if directory is None else directory)
        with self.world.raise_together("look at the run directory"):
            refuse_taken_place(run_dir, "save")
            if run_dir.is_dir() and any(run_dir.iterdir()):
                raise UserError(f"save {run_dir}: the directory is not empty; choose a new one")
        self.world.run_on_first("make the run directory", partial(make_run_directory, run_dir))
        before = self.untrained_logits
        self.write_adapter(run_dir / "adapter")
        trained = self.probe.compute_logits()

        def write_rest() -> None:
            self.probe.save_logits(run_dir / PROBE_FILE, before, trained)
            write_run_config(run_dir, self.config)
            write_model_card(run_dir, run_dir / ADAPTER, ADAPTER)

        self.world.run_on_first("write probe and configuration", write_rest)
        return run_dir

    @cached_property
    def untrained_logits(self) -> Tensor:
        """Logits of the probe with the adapter off; read before training where it has no off."""
        return self.probe.compute_base_logits()

    def write_adapter(self, directory: Path) -> None:
        """Gather the adapter, and write ``directory`` from the first rank.

        Raises:
            UserError: on every rank: the disk is full or not writable.
        """
        if isinstance(self.built.setup.adapter, TrainsBaseWeights):
            about = {"kind": self.config.adapter.kind, **self.make_metadata()}
            write_trained_weights(
                self.built, self.world, directory, about, self._save_chat_tokenizer
            )
            return
        tensors = self.built.gather_adapter(keep=self.world.is_first)
        write = partial(self._write_adapter_files, directory, tensors)
        self.world.run_on_first("write the adapter", write)

    def _write_adapter_files(self, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        base = find_public_base_name(self.config, self.built)
        public = self.built.setup.adapter.to_public_adapter(tensors, base)
        with publish_directory(directory) as staged:
            write_adapter_directory(staged, public, self.make_metadata())
            self._save_chat_tokenizer(staged)

    def make_metadata(self) -> dict[str, Any]:
        """Return the contents of the adapter's ``dist_peft.json``."""
        chats = self.loaders.has_conversations
        return describe_adapter(self.config, self.built, self.turn_end_ids, chats)

    @cached_property
    def turn_end_ids(self) -> list[int]:
        """Ids of the tokens that end the turns in the training data."""
        rows, tokenizer = self.loaders.train.rows, self.built.setup.tokenizer
        if self.config.data.is_classification:
            return []
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        return find_turn_end_ids(cast(Any, rows), special)

    def _save_chat_tokenizer(self, directory: Path) -> None:
        if (template := self.loaders.chat_template) is not None:
            save_tokenizer(self.built.setup.tokenizer, directory, template)

    # -- end ---------------------------------------------------------------------------------------

    def close(self) -> None:
        """Remove the hooks from the model; a later step puts them back."""
        if self._parts is not None:
            self._parts.close()
            self._parts = None
