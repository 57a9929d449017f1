"""Cross entropy of classes and classification metrics.

One matrix of logits serves several tasks; of a row only the classes of its task count::

    logits        z_0 z_1 | z_2 z_3 z_4        row of the second task: softmax over z_2 z_3 z_4

Accuracy is the share of rows whose largest logit is the right one. Macro F1 is the plain mean of
each class's ``F1 = 2 right / (predicted + actual)`` over the classes that occur, among the labels
or the predictions (as scikit-learn's ``f1_score(average="macro")``).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dist_peft.data.classification import LabelledBatch
from dist_peft.train.loss import IGNORE

__all__ = [
    "ClassScores",
    "batch_class_losses",
    "class_losses",
    "compute_class_scores",
    "count_predictions",
    "mask_other_classes",
]


def mask_other_classes(logits: Tensor, ranges: Tensor) -> Tensor:
    """Return ``logits`` [B, C] in float32, minus infinity outside each row's ``ranges`` [B, 2]."""
    ids = torch.arange(logits.shape[1], device=logits.device)
    inside = (ids >= ranges[:, :1]) & (ids < ranges[:, 1:])
    return logits.float().masked_fill(~inside, -torch.inf)


def class_losses(logits: Tensor, labels: Tensor, ranges: Tensor) -> Tensor:
    """Return the cross entropy of each row over the classes of its task, in nats.

    Args:
        logits: ``[B, C]`` of any float dtype.
        labels: int64 ``[B]``, class ids, or -100.
        ranges: int64 ``[B, 2]``, class ids [first, stop) of the row's task.

    Returns:
        float32 ``[B]``; 0 where there is no label.
    """
    return functional.cross_entropy(
        mask_other_classes(logits, ranges), labels, ignore_index=IGNORE, reduction="none"
    )


def batch_class_losses(logits: Tensor, batch: LabelledBatch) -> Tensor:
    """Return ``class_losses`` of a batch, on the device of ``logits``."""
    device = logits.device
    return class_losses(logits, batch.labels[:, 0].to(device), batch.ranges.to(device))


@dataclass(frozen=True)
class ClassScores:
    """Accuracy and macro F1, between 0 and 1."""

    accuracy: float
    macro_f1: float

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.4f}, macro F1 {self.macro_f1:.4f}"


def count_predictions(logits: Tensor, batch: LabelledBatch) -> Tensor:
    """Return counts of each row from which scores are computed, float64 ``[B, 3, C]`` on the CPU.

    For each class: whether the row is a true positive, was predicted so, is actually so. All are 0
    in a filler row.
    """
    labels, classes = batch.labels[:, 0], logits.shape[1]
    chosen = mask_other_classes(logits, batch.ranges.to(logits.device)).argmax(1).cpu()
    predicted = functional.one_hot(chosen, classes)
    actual = functional.one_hot(labels.clamp_min(0), classes)
    counts = torch.stack([predicted * actual, predicted, actual], 1)
    return counts.double() * (labels != IGNORE)[:, None, None]


def compute_class_scores(counts: Tensor) -> ClassScores:
    """Compute accuracy and macro F1 from counts ``[3, C]`` summed over at least one row."""
    right, predicted, actual = counts
    occurs = (predicted + actual) > 0
    f1 = 2 * right[occurs] / (predicted + actual)[occurs]
    return ClassScores(float(right.sum() / actual.sum()), float(f1.mean()))
