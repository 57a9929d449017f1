"""The training loop: accumulate gradients over batches, clip, update, report.

The loss of an optimizer step is the mean over all its target tokens, wherever they are: each
micro-batch contributes the *sum* of its token losses over the *global* number of target tokens,
which the loader knows without communication, and engines sum gradients over ranks. Neither the
number of ranks nor the split of sequences into micro-batches changes the result.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from dist_peft.adapters.protocol import Adapter
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.data.classification import LabelledBatch
from dist_peft.data.loader import Batch, Loader
from dist_peft.engine import Engine
from dist_peft.model.attention_mask import build_batch_inputs
from dist_peft.train.classification_metrics import batch_class_losses
from dist_peft.train.loss import sum_token_loss

__all__ = ["StepResult", "compute_batch_loss", "run_training_steps"]


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank.

    ``loss`` is the mean over the step's target tokens in nats, ``grad_norm`` the norm before
    clipping, ``tokens`` the number of target tokens, ``seconds`` the wall time.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    bytes_gathered: int


def compute_batch_loss(
    model: nn.Module, batch: Batch, device: torch.device, call: nn.Module | None = None
) -> torch.Tensor:
    """Return the sum of the losses of a batch's targets; packed documents are isolated.

    ``call``: module to call instead of ``model`` (an engine's wrapper of it).
    """
    logits = (call or model)(**build_batch_inputs(model, batch, device), use_cache=False).logits
    if isinstance(batch, LabelledBatch):
        return batch_class_losses(logits, batch).sum()
    return sum_token_loss(logits, batch.labels.to(device))


def run_training_steps(
    model: nn.Module,
    engine: Engine,
    adapter: Adapter,
    loader: Loader,
    world: World,
    *,
    call: nn.Module | None = None,
    first_step: int,
    last_step: int,
    lr_at: Callable[[int], float],
    max_grad_norm: float,
    after_step: Callable[[StepResult], bool],
) -> int:
    """Train from ``first_step`` until ``last_step`` steps are done or ``after_step`` says stop.

    ``call`` is the module to call in training steps, as returned by ``engine.setup_optimizer``.

    Returns the number of steps done. Raises UserError on every rank when a loss or gradient is
    not finite; the adapters are then as the last good step left them.
    """
    for step in range(first_step, last_step):
        start, gathered = time.perf_counter(), engine.bytes_gathered
        batches, targets = loader.load_step(step)
        total = torch.zeros((), dtype=torch.float64)
        for number, batch in enumerate(batches):
            adapter.begin_micro_batch(step, batch.sample_ids)
            loss = compute_batch_loss(model, batch, engine.device, call)
            total += loss.detach().double().cpu()
            mean_part = loss / targets
            adapter.add_penalty_gradient(mean_part, len(batches) * world.size)
            engine.backward(mean_part, last=number == len(batches) - 1)
        mean = world.sum_over_ranks(total.item())[0] / targets
        norm = engine.step(lr_at(step), max_grad_norm) if math.isfinite(mean) else math.nan
        if not (math.isfinite(mean) and math.isfinite(norm)):
            raise UserError(
                f"step {step + 1}: loss {mean:g}, gradient norm {norm:g} is not finite; the "
                "adapters are unchanged since the step before. Lower train.lr, raise "
                "train.warmup, or use base.compute_dtype bfloat16 or float32 instead of float16"
            )
        result = StepResult(
            step + 1,
            mean,
            lr_at(step),
            norm,
            targets,
            time.perf_counter() - start,
            engine.bytes_gathered - gathered,
        )
        if after_step(result):
            return step + 1
    return last_step
