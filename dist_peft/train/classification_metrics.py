"""Cross entropy of classes and classification metrics.

One matrix of logits serves several tasks; of a row only the classes of its task count::

    logits        z_0 z_1 | z_2 z_3 z_4        row of the second task: softmax over z_2 z_3 z_4

Accuracy is the share of rows whose largest logit is the right one. Macro F1 is the plain mean of
each class's ``F1 = 2 right / (predicted + actual)`` over the classes that occur, among the labels
or the predictions (as scikit-learn's ``f1_score(average="macro")``). F1 of one class, that of
``data.train[].positive_label``, is GLUE's score of MRPC and QQP; 0 where the class occurs nowhere.

The Matthews correlation, GLUE's score of CoLA, is the correlation of labels and predictions
(Matthews 1975; for K classes R_K of Gorodkin 2004). With ``s`` rows, ``c`` of them right, and
``p_k`` predicted and ``t_k`` actual rows of class k::

    mcc = (c s - sum_k p_k t_k) / sqrt((s^2 - sum_k p_k^2) (s^2 - sum_k t_k^2))

It is 1 if all are right, about 0 for guesses whatever the shares of the classes, and 0 by
convention where one class is always predicted or always right (0 / 0).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dist_peft.core.device_copy import copy_to_device
from dist_peft.data.classification import LabelledBatch
from dist_peft.train.loss import IGNORE
from dist_peft.train.step_metrics import SCORE_TITLES

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
    return class_losses(
        logits, copy_to_device(batch.labels[:, 0], device), copy_to_device(batch.ranges, device)
    )


@dataclass(frozen=True)
class ClassScores:
    """Scores of classes.

    Attributes:
        accuracy, macro_f1: between 0 and 1.
        matthews: Matthews correlation, between -1 and 1.
        f1: of the positive class, between 0 and 1; None if none is named.
    """

    accuracy: float
    macro_f1: float
    matthews: float
    f1: float | None = None

    def __str__(self) -> str:
        values = {SCORE_TITLES[name]: getattr(self, name) for name in SCORE_TITLES}
        return ", ".join(f"{t} {value:.4f}" for t, value in values.items() if value is not None)


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


def compute_class_scores(counts: Tensor, positive: int | None = None) -> ClassScores:
    """Compute scores from counts ``[3, C]`` summed over at least one row.

    Args:
        positive: class id whose F1 is computed too.
    """
    right, predicted, actual = counts
    either = predicted + actual
    f1 = 2 * right / either.clamp_min(1)
    return ClassScores(
        accuracy=float(right.sum() / actual.sum()),
        macro_f1=float(f1[either > 0].mean()),
        matthews=_compute_matthews(right, predicted, actual),
        f1=None if positive is None else float(f1[positive]),
    )


def _compute_matthews(right: Tensor, predicted: Tensor, actual: Tensor) -> float:
    rows = actual.sum()
    covariance = right.sum() * rows - (predicted * actual).sum()
    variances = [rows**2 - counts.square().sum() for counts in (predicted, actual)]
    spread = float((variances[0] * variances[1]).sqrt())
    return float(covariance) / spread if spread else 0.0
