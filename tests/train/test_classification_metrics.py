import pytest
import torch
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
    assert str(both) == "accuracy 0.5714, macro F1 0.3333"
