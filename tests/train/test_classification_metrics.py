import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from dist_peft.data.classification import LabelledBatch
from dist_peft.train.classification_metrics import (
    class_losses,
    compute_class_scores,
    count_predictions,
    mask_other_classes,
)

LOGITS = torch.tensor([[1.0, 2.0, 9.0, 0.0], [9.0, 0.0, 1.0, 0.5], [3.0, 1.0, 0.0, 0.0]])
RANGES = torch.tensor([[0, 2], [2, 4], [0, 1]])


def test_softmax_runs_over_the_rows_own_task() -> None:
    logits = LOGITS.clone().requires_grad_()
    labels = torch.tensor([1, 2, -100])
    losses = class_losses(logits, labels, RANGES)
    expected = [
        functional.cross_entropy(LOGITS[0, :2], torch.tensor(1)),
        functional.cross_entropy(LOGITS[1, 2:], torch.tensor(0)),
        torch.tensor(0.0),
    ]
    torch.testing.assert_close(losses, torch.stack(expected))
    losses.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    outside = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    assert not logits.grad[outside].any()
    assert mask_other_classes(LOGITS.bfloat16(), RANGES).argmax(1).tolist() == [1, 2, 0]


def batch_of(labels: list[int], ranges: list[list[int]]) -> LabelledBatch:
    one = torch.ones(len(labels), 1, dtype=torch.long)
    return LabelledBatch(
        one, torch.tensor(labels)[:, None], one, one, one, one, torch.tensor(ranges)
    )


def test_scores() -> None:
    """Against the definition: precision and recall of each class."""
    chosen, labels = [0, 0, 1, 1, 1, 0, 3], [0, 1, 1, 1, 0, 0, 2]
    logits = functional.one_hot(torch.tensor([*chosen, 0]), 4).float()
    batch = batch_of([*labels, -100], [[0, 2]] * 6 + [[2, 4], [0, 1]])  # the last one is a filler
    counts = count_predictions(logits, batch)
    assert counts.shape == (8, 3, 4) and not counts[-1].any()
    scores = compute_class_scores(counts[:6].sum(0))
    assert scores.accuracy == pytest.approx(4 / 6)
    assert scores.macro_f1 == pytest.approx((2 / 3 + 2 / 3) / 2)  # classes 2 and 3 do not occur
    both = compute_class_scores(counts.sum(0))
    assert both.accuracy == pytest.approx(4 / 7)
    assert both.macro_f1 == pytest.approx((2 / 3 + 2 / 3 + 0 + 0) / 4)
    assert str(both) == "accuracy 0.5714, macro F1 0.3333, Matthews correlation 0.3333"


@pytest.mark.parametrize("classes", [2, 5])
def test_matthews_correlation_and_f1_of_a_class(classes: int) -> None:
    """Two classes: the correlation coefficient; more: Gorodkin's covariances, sample by sample."""
    random = np.random.default_rng(classes)
    labels = random.integers(0, classes, 101)
    chosen = np.where(random.random(101) < 0.6, labels, random.integers(0, classes, 101))
    found = compute_class_scores(count_classes(chosen, labels, classes), positive=1)

    one_hot = np.eye(classes)
    x, y = (one_hot[ids] - one_hot[ids].mean(0) for ids in (chosen, labels))
    expected = (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())
    assert found.matthews == pytest.approx(expected)
    if classes == 2:
        assert found.matthews == pytest.approx(np.corrcoef(chosen, labels)[0, 1])
    right = ((chosen == 1) & (labels == 1)).sum()
    precision, recall = right / (chosen == 1).sum(), right / (labels == 1).sum()
    assert found.f1 == pytest.approx(2 * precision * recall / (precision + recall))


def test_scores_without_a_denominator_are_0() -> None:
    always = np.zeros(9, dtype=np.int64)
    varied = np.arange(9) % 2
    for chosen, labels in ((always, varied), (varied, always), (always, always)):
        assert compute_class_scores(count_classes(chosen, labels, 3)).matthews == 0
    scores = compute_class_scores(count_classes(always, always, 3), positive=2)
    assert (scores.accuracy, scores.f1) == (1, 0)
    assert str(scores).endswith("Matthews correlation 0.0000, F1 0.0000")


def count_classes(
    chosen: NDArray[np.int64], labels: NDArray[np.int64], classes: int
) -> torch.Tensor:
    logits = functional.one_hot(torch.from_numpy(chosen), classes).float()
    batch = batch_of(labels.tolist(), [[0, classes]] * len(labels))
    return count_predictions(logits, batch).sum(0)
