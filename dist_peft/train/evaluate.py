"""Held-out loss: mean over all targets of the evaluation sequences, in nats; class scores."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dist_peft.core.world import World
from dist_peft.data.classification import LabelledBatch
from dist_peft.data.loader import Batch, Loader
from dist_peft.data.mixture import Mixture
from dist_peft.engine import Engine
from dist_peft.model.attention_mask import batch_inputs
from dist_peft.train.classification_metrics import (
    ClassCounts,
    Scores,
    in_range,
    labelled_losses,
    sum_of,
)
from dist_peft.train.loss import IGNORE, token_loss

__all__ = ["HeldOut", "evaluate", "inference", "row_losses"]


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Disable gradients, and dropout in adapters."""
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
    """Mean loss over all targets and over those of each task of a ``Mixture``; for labelled rows
    the scores, too."""

    loss: float
    by_task: dict[str, float]
    scores: Scores | None = None
    scores_by_task: dict[str, Scores] = field(default_factory=dict)

    def __str__(self) -> str:
        tasks = ", ".join(f"{name} {self._of_task(name)}" for name in self.by_task)
        scores = "" if self.scores is None else f", {self.scores}"
        return f"{self.loss:.4f}{scores}{f' ({tasks})' if tasks else ''}"

    def _of_task(self, name: str) -> str:
        scores = self.scores_by_task.get(name)
        return f"{self.by_task[name]:.4f}{'' if scores is None else f', {scores}'}"

    def values(self, after: str = "") -> dict[str, Any]:
        """Return the known values under the names of the fields of ``StepMetrics``.

        Args:
            after: suffix of each name, such as ``_before``.
        """
        found: dict[str, Any] = {"eval_loss": self.loss}
        if self.by_task:
            found["eval_by_task"] = self.by_task
        for name in () if self.scores is None else ("accuracy", "macro_f1"):
            found[f"eval_{name}"] = getattr(self.scores, name)
            if self.scores_by_task:
                own = {task: getattr(s, name) for task, s in self.scores_by_task.items()}
                found[f"eval_{name}_by_task"] = own
        return {f"{name}{after}": value for name, value in found.items()}


def evaluate(model: nn.Module, engine: Engine, loader: Loader, world: World) -> HeldOut:
    """Evaluate the held-out loss; each rank computes the same number of batches of its share."""
    rows = loader.rows
    names = rows.names if isinstance(rows, Mixture) else ("",)
    sums = torch.zeros(len(names), 2, dtype=torch.float64)  # losses, targets
    counts: list[ClassCounts] = []
    with inference(model):
        for batch in loader.sequential():
            targets = (batch.labels != IGNORE).sum(1)
            logits = _logits(model, batch, engine.device)
            losses = _row_losses(logits, batch)
            if isinstance(batch, LabelledBatch):
                counts = counts or [ClassCounts.none(logits.shape[1]) for _ in names]
                chosen = in_range(logits, batch.ranges.to(logits.device)).argmax(1).tolist()
            for b, sample in enumerate(batch.sample_ids.tolist()):
                if sample >= 0:
                    task = rows.source(sample) if isinstance(rows, Mixture) else 0
                    sums[task] += torch.stack([losses[b], targets[b].double()])
                    if counts:
                        counts[task].add(chosen[b], int(batch.labels[b]))
    sums = _summed(sums, world)
    counts = [ClassCounts(_summed(count.counts, world)) for count in counts]
    loss, targets = sums.sum(0).tolist()
    several = isinstance(rows, Mixture)
    means = (sums[:, 0] / sums[:, 1]).tolist()
    return HeldOut(
        loss / targets,
        dict(zip(names, means, strict=True)) if several else {},
        sum_of(counts).scores() if counts else None,
        {n: c.scores() for n, c in zip(names, counts, strict=False)} if several else {},
    )


def _summed(tensor: Tensor, world: World) -> Tensor:
    """Sum over all ranks."""
    return torch.tensor(world.sum(*tensor.flatten().tolist()), dtype=tensor.dtype).view_as(tensor)


def _logits(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    found: Tensor = model(**batch_inputs(model, batch, device), use_cache=False).logits
    return found


def _row_losses(logits: Tensor, batch: Batch) -> Tensor:
    if isinstance(batch, LabelledBatch):
        return labelled_losses(logits, batch).double().cpu()
    labels = batch.labels.to(logits.device)
    rows = [token_loss(logits[b : b + 1], labels[b : b + 1]) for b in range(len(labels))]
    return torch.stack(rows).double().cpu()


def row_losses(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """Return the summed loss of each sequence's targets in nats, float64 ``[B]`` on the CPU."""
    return _row_losses(_logits(model, batch, device), batch)
