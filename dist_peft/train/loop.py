"""The parts of a training step: accumulate gradients over micro-batches, clip and update.

``app.trainer.Trainer.run_training_loop`` is the loop that puts them together with metrics,
evaluation and checkpoints.

The loss of an optimizer step is the mean over all its targets, wherever they are: each micro-batch
contributes the *sum* of its losses over the *global* number of targets, which the loader knows
without communication, and engines sum gradients over ranks. Neither the number of ranks nor the
split of sequences into micro-batches changes the result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from dist_peft.adapters.protocol import Adapter
from dist_peft.core.errors import RunFailure
from dist_peft.core.progress_beat import mark_progress, start_step_phase
from dist_peft.core.world import World
from dist_peft.data.loader import Batch
from dist_peft.engine import Engine
from dist_peft.model.embedding_noise import EmbeddingNoise
from dist_peft.quant.fixed_point import SplitSum
from dist_peft.train.gradient_watch import GradientWatch
from dist_peft.train.importance import EngineParameters
from dist_peft.train.nonfinite import FailedStep
from dist_peft.train.objective import Objective, TokenObjective
from dist_peft.train.predicted_inputs import ScheduledSampling

__all__ = ["TrainingStep", "count_penalty_parts"]


def count_penalty_parts(batch: Batch, own: int, world: World, micro_batches: int | None) -> float:
    """Return by which number a micro-batch divides the adapter's penalty, infinite for none.

    Args:
        own: micro-batches of this rank.
        micro_batches: of a step over all ranks; None: see ``TrainingStep``.
    """
    if micro_batches is None:
        return own * world.data_size
    return micro_batches if bool((batch.sample_ids >= 0).any()) else math.inf


@dataclass(frozen=True)
class TrainingStep:
    """Everything that computes an optimizer step.

    Attributes:
        call: module to call in training steps, as returned by ``engine.setup_optimizer``.
        objective: takes the batches that are passed.
        watch: looks at the gradient of each micro-batch.
        noise: of the embeddings (``train.neftune_alpha``).
        losses: summed losses of this rank's micro-batches in the step computed last.
        sampling: replaces inputs before each loss; None: inputs are the gold tokens.
        micro_batches: of a step over all ranks, which share out the adapter's penalty; None:
            fillers have a share as well, so that its rounding depends on the number of ranks.
        method_metrics: of the step computed last, fields of ``StepMetrics``.
    """

    model: nn.Module
    call: nn.Module
    engine: Engine
    adapter: Adapter
    objective: Objective[Any]
    world: World
    watch: GradientWatch | None = None
    noise: EmbeddingNoise | None = None
    losses: list[Tensor] = field(default_factory=list)
    sampling: ScheduledSampling | None = None
    micro_batches: int | None = None
    method_metrics: dict[str, Any] = field(default_factory=dict)

    def accumulate_gradients(self, step: int, batches: Sequence[Batch], targets: int) -> float:
        """Run forward and backward of this rank's micro-batches; gradients are summed over ranks.

        Args:
            step: number of steps done before.
            batches: at least one, equally many on every rank.
            targets: number of targets of the step, over all ranks.

        Where the loss of a micro-batch is not finite, so is its gradient: ``update_parameters``
        then updates nothing on any rank.

        Returns:
            The mean loss over the step's targets in nats, the same on every rank.
        """
        self.losses.clear()
        if self.watch is not None:
            self.watch.begin_step()
        if self.sampling is not None:
            self.sampling.begin_step(step)
        start_step_phase(step + 1, "forward and backward")
        targets = max(1, targets)  # a step may have unlabelled rows alone
        self.objective.begin_step(step, batches, targets, self.world)
        for number, batch in enumerate(batches):
            mark_progress()
            self.adapter.begin_micro_batch(step, batch.sample_ids)
            if self.watch is not None:
                self.watch.begin_micro_batch()
            inputs = self._mix_inputs(batch)
            if self.noise is not None:
                self.noise.begin_micro_batch(step, batch.input_ids, batch.measure_documents())
            loss = self.objective.compute_loss(self.model, inputs, self.engine.device, self.call)
            self.losses.append(loss.detach())  # read once a step: no wait for the device here
            # a target with logit -inf has an infinite loss and a finite gradient
            mean_part = loss * torch.where(loss.detach().isfinite(), 1.0, math.nan) / targets
            parts = count_penalty_parts(batch, len(batches), self.world, self.micro_batches)
            self.adapter.add_penalty_gradient(mean_part, parts)
            self.engine.backward(mean_part, last=number == len(batches) - 1)
            if self.noise is not None:
                self.noise.end_micro_batch()
        counts = [] if self.sampling is None else self.sampling.counts
        whole, *counted = self._sum_exactly(torch.stack(self.losses), counts)
        if self.sampling is not None:
            replaced, replaceable = counted
            self.method_metrics["sampling_eps"] = self.sampling.eps
            self.method_metrics["sampling_replaced"] = replaced / max(1.0, replaceable)
        self.method_metrics.update(self.objective.collect_metrics(self.world))
        return whole / targets

    def _sum_exactly(self, losses: Tensor, counts: Sequence[float]) -> list[float]:
        """Return the sums over ranks of ``losses`` [micro-batches] and of each count, the same bits
        at any number of ranks."""
        summed = SplitSum(1 + len(counts))
        first = torch.zeros(len(losses), dtype=torch.long)
        summed.add_rows(losses[:, None], first)
        if counts:
            summed.add_rows(torch.tensor(counts)[:, None], torch.arange(1, 1 + len(counts)))
        self.world.all_reduce_sum(summed.integers)
        return summed.to_floats()

    def _mix_inputs(self, batch: Batch) -> Batch:
        """Return the micro-batch whose loss is computed."""
        if self.sampling is None:
            return batch
        objective = cast(TokenObjective, self.objective)  # configurations with another are refused
        return self.sampling.mix_inputs(self.model, objective, batch, self.engine.device)

    def update_parameters(self, step: int, loss: float, lr: float, max_grad_norm: float) -> float:
        """Clip the accumulated gradients and update; return their norm before clipping.

        Where it is not finite, adapters and optimizer are on every rank as the step before has left
        them, and the next step may follow.

        Args:
            step: number of steps done before.
            loss: as returned by ``accumulate_gradients``.

        Raises:
            RunFailure: on every rank: the loss is not finite, and the gradient is.
        """
        start_step_phase(step + 1, "update")
        norm = self.engine.step(lr, max_grad_norm)
        if math.isfinite(norm) and not math.isfinite(loss):
            raise RunFailure(
                f"step {step + 1}: the loss is {loss:g} and its gradient, of norm {norm:g}, does "
                "not show it: the update was made; resume from the last checkpoint"
            )
        return norm

    def finish_step(self, done: int) -> None:
        """Let the adapter act after the update that made it ``done`` steps."""
        self.adapter.finish_step(done, EngineParameters(self.model, self.engine))

    def describe_failure(
        self, step: int, batches: Sequence[Batch], loss: float, norm: float, lr: float
    ) -> FailedStep:
        """Describe step ``step`` (from 0), whose ``loss`` or ``norm`` is not finite."""
        losses = [value.item() for value in self.losses]
        seen = [] if self.watch is None else self.watch.list_not_finite()
        return FailedStep(step + 1, loss, norm, lr, batches, losses, seen)

    def close(self) -> None:
        """Remove the hooks of ``watch`` and ``noise``."""
        for hooked in (self.watch, self.noise):
            if hooked is not None:
                hooked.close()
