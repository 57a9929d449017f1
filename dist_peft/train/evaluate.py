"""Held-out loss: mean over all target tokens of the evaluation rows, in nats."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_peft.core.world import World
from dist_peft.data.loader import Batch, Loader
from dist_peft.data.mixture import Mixture
from dist_peft.engine import Engine
from dist_peft.model.attention import model_inputs
from dist_peft.train.loss import IGNORE, token_loss

__all__ = ["HeldOut", "evaluate", "inference", "row_losses"]


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout in adapters."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class HeldOut:
    """Mean loss over all target tokens, and over those of each task of a ``Mixture``."""

    loss: float
    by_task: dict[str, float]

    def __str__(self) -> str:
        tasks = ", ".join(f"{name} {loss:.4f}" for name, loss in self.by_task.items())
        return f"{self.loss:.4f}{f' ({tasks})' if tasks else ''}"


def evaluate(model: nn.Module, engine: Engine, loader: Loader, world: World) -> HeldOut:
    """Every rank computes its share of the rows, the same number of batches on each."""
    rows = loader.rows
    names = rows.names if isinstance(rows, Mixture) else ("",)
    totals, counts = [0.0] * len(names), [0.0] * len(names)
    with inference(model):
        for batch in loader.sequential():
            targets = (batch.labels != IGNORE).sum(1)
            losses = row_losses(model, batch, engine.device)
            for b, sample in enumerate(batch.sample_ids.tolist()):
                if sample >= 0:
                    task = rows.source(sample) if isinstance(rows, Mixture) else 0
                    totals[task] += float(losses[b])
                    counts[task] += int(targets[b])
    summed = world.sum(*totals, *counts)
    totals, counts = summed[: len(names)], summed[len(names) :]
    by_task = {n: t / c for n, t, c in zip(names, totals, counts, strict=True)}
    return HeldOut(sum(totals) / sum(counts), by_task if isinstance(rows, Mixture) else {})


def row_losses(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """Sum of the token losses of each row of a batch, in nats: float64 [B] on the CPU."""
    ids, positions = batch.input_ids.to(device), batch.position_ids.to(device)
    logits = model(**model_inputs(model, ids, positions), use_cache=False).logits
    labels = batch.labels.to(device)
    rows = [token_loss(logits[b : b + 1], labels[b : b + 1]) for b in range(len(labels))]
    return torch.stack(rows).double().cpu()
