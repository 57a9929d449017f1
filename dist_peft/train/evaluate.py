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
from dist_peft.data.mixture import SequenceMixture
from dist_peft.engine import Engine
from dist_peft.model.attention_mask import build_batch_inputs
from dist_peft.train.classification_metrics import (
    ClassCounts,
    ClassScores,
    batch_class_losses,
    mask_other_classes,
    sum_class_counts,
)
from dist_peft.train.loss import IGNORE, sum_token_loss

__all__ = ["EvalResult", "compute_row_losses", "evaluate_model", "inference_mode"]


@contextmanager
def inference_mode(model: nn.Module) -> Iterator[None]:
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
class EvalResult:
    """Mean loss over all targets and over those of each task of a ``SequenceMixture``; for
    labelled rows the scores, too."""

    loss: float
    by_task: dict[str, float]
    scores: ClassScores | None = None
    scores_by_task: dict[str, ClassScores] = field(default_factory=dict)

    def __str__(self) -> str:
        tasks = ", ".join(f"{name} {self._task_suffix(name)}" for name in self.by_task)
        scores = "" if self.scores is None else f", {self.scores}"
        return f"{self.loss:.4f}{scores}{f' ({tasks})' if tasks else ''}"

    def _task_suffix(self, name: str) -> str:
        scores = self.scores_by_task.get(name)
        return f"{self.by_task[name]:.4f}{'' if scores is None else f', {scores}'}"

    def to_metric_fields(self, after: str = "") -> dict[str, Any]:
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


def evaluate_model(model: nn.Module, engine: Engine, loader: Loader, world: World) -> EvalResult:
    """Evaluate the held-out loss; each rank computes the same number of batches of its share."""
    rows = loader.rows
    names = rows.names if isinstance(rows, SequenceMixture) else ("",)
    sums = torch.zeros(len(names), 2, dtype=torch.float64)  # losses, targets
    counts: list[ClassCounts] = []
    with inference_mode(model):
        for batch in loader.load_all_sequential():
            targets = (batch.labels != IGNORE).sum(1)
            logits = _forward_logits(model, batch, engine.device)
            losses = _sum_losses_by_row(logits, batch)
            if isinstance(batch, LabelledBatch):
                counts = counts or [ClassCounts.zero_counts(logits.shape[1]) for _ in names]
                chosen = (
                    mask_other_classes(logits, batch.ranges.to(logits.device)).argmax(1).tolist()
                )
            for b, sample in enumerate(batch.sample_ids.tolist()):
                if sample >= 0:
                    task = (
                        rows.find_source_index(sample) if isinstance(rows, SequenceMixture) else 0
                    )
                    sums[task] += torch.stack([losses[b], targets[b].double()])
                    if counts:
                        counts[task].add_prediction(chosen[b], int(batch.labels[b]))
    sums = _sum_over_ranks(sums, world)
    counts = [ClassCounts(_sum_over_ranks(count.counts, world)) for count in counts]
    loss, targets = sums.sum(0).tolist()
    several = isinstance(rows, SequenceMixture)
    means = (sums[:, 0] / sums[:, 1]).tolist()
    return EvalResult(
        loss / targets,
        dict(zip(names, means, strict=True)) if several else {},
        sum_class_counts(counts).compute_scores() if counts else None,
        {n: c.compute_scores() for n, c in zip(names, counts, strict=False)} if several else {},
    )


def _sum_over_ranks(tensor: Tensor, world: World) -> Tensor:
    """Sum over all ranks."""
    return torch.tensor(
        world.sum_over_ranks(*tensor.flatten().tolist()), dtype=tensor.dtype
    ).view_as(tensor)


def _forward_logits(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    found: Tensor = model(**build_batch_inputs(model, batch, device), use_cache=False).logits
    return found


def _sum_losses_by_row(logits: Tensor, batch: Batch) -> Tensor:
    if isinstance(batch, LabelledBatch):
        return batch_class_losses(logits, batch).double().cpu()
    labels = batch.labels.to(logits.device)
    rows = [sum_token_loss(logits[b : b + 1], labels[b : b + 1]) for b in range(len(labels))]
    return torch.stack(rows).double().cpu()


def compute_row_losses(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """Return the summed loss of each sequence's targets in nats, float64 ``[B]`` on the CPU."""
    return _sum_losses_by_row(_forward_logits(model, batch, device), batch)
