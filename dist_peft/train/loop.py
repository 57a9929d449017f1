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
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dist_peft.adapters.protocol import Adapter
from dist_peft.core.errors import UserError
from dist_peft.core.progress_beat import mark_progress, start_step_phase
from dist_peft.core.world import World
from dist_peft.data.loader import Batch
from dist_peft.engine import Engine
from dist_peft.train.objective import Objective

__all__ = ["TrainingStep"]


@dataclass(frozen=True)
class TrainingStep:
    """Everything that computes an optimizer step.

    Attributes:
        call: module to call in training steps, as returned by ``engine.setup_optimizer``.
        objective: takes the batches that are passed.
    """

    model: nn.Module
    call: nn.Module
    engine: Engine
    adapter: Adapter
    objective: Objective[Any]
    world: World

    def accumulate_gradients(self, step: int, batches: Sequence[Batch], targets: int) -> float:
        """Run forward and backward of this rank's micro-batches; gradients are summed over ranks.

        Args:
            step: number of steps done before.
            batches: at least one, equally many on every rank.
            targets: number of targets of the step, over all ranks.

        Returns:
            The mean loss over the step's targets in nats, the same on every rank.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        start_step_phase(step + 1, "forward and backward")
        for number, batch in enumerate(batches):
            mark_progress()
            self.adapter.begin_micro_batch(step, batch.sample_ids)
            loss = self.objective.compute_loss(self.model, batch, self.engine.device, self.call)
            total += loss.detach().double()  # read once a step: no wait for the device here
            mean_part = loss / targets
            self.adapter.add_penalty_gradient(mean_part, len(batches) * self.world.data_size)
            self.engine.backward(mean_part, last=number == len(batches) - 1)
        return self.world.sum_over_ranks(total.item())[0] / targets

    def update_parameters(self, step: int, loss: float, lr: float, max_grad_norm: float) -> float:
        """Clip the accumulated gradients and update; return their norm before clipping.

        Args:
            step: number of steps done before.
            loss: as returned by ``accumulate_gradients``.

        Raises:
            UserError: on every rank: the loss or a gradient is not finite. The adapters are then
                as the last good step left them.
        """
        start_step_phase(step + 1, "update")
        norm = self.engine.step(lr, max_grad_norm) if math.isfinite(loss) else math.nan
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(
                f"step {step + 1}: loss {loss:g}, gradient norm {norm:g} is not finite; the "
                "adapters are unchanged since the step before. Lower train.lr, raise "
                "train.warmup, or use base.compute_dtype bfloat16 or float32 instead of float16"
            )
        return norm
