import pytest
import torch
from torch.nn import functional

from dist_peft.train.classification_metrics import (
    ClassCounts,
    class_losses,
    mask_other_classes,
    sum_class_counts,
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


def test_scores() -> None:
    """Against the definition: precision and recall of each class."""
    chosen, labels = [0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0]
    counts = ClassCounts.zero_counts(4)
    for c, label in zip(chosen, labels, strict=True):
        counts.add_prediction(c, label)
    scores = counts.compute_scores()
    assert scores.accuracy == pytest.approx(4 / 6)
    assert scores.macro_f1 == pytest.approx((2 / 3 + 2 / 3) / 2)  # classes 2 and 3 do not occur
    other = ClassCounts.zero_counts(4)
    other.add_prediction(3, 2)
    both = sum_class_counts([counts, other]).compute_scores()
    assert both.accuracy == pytest.approx(4 / 7)
    assert both.macro_f1 == pytest.approx((2 / 3 + 2 / 3 + 0 + 0) / 4)
    assert str(both) == "accuracy 0.5714, macro F1 0.3333"
