"""Held-out loss against a dense computation, and the model left as it was."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional

from dist_peft.core.world import World
from dist_peft.data.classification import LabelledLoader
from dist_peft.data.labels import ClassTask
from dist_peft.data.mixture import SequenceMixture
from dist_peft.engine.single import SingleEngine
from dist_peft.train.evaluate import EvalResult, evaluate_model, inference_mode
from dist_peft.train.objective import ClassificationObjective, TokenObjective
from tests.support.dist import run_ranks
from tests.support.row_sets import UnevenRows, make_loader
from tests.support.tiny_models import CONFIGS, ENCODERS

CPU = torch.device("cpu")
ROWS = UnevenRows([1, 9, 3, 14, 2])


def tiny_model() -> tf.PreTrainedModel:
    torch.manual_seed(0)
    # a copy: transformers writes the type into a configuration that it is given
    config = copy.deepcopy(CONFIGS["llama"])
    return tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def dense_loss(model: nn.Module) -> float:
    total, count = 0.0, 0
    with torch.no_grad():
        for index in range(len(ROWS)):
            tokens, labels, _ = ROWS.get_sequence(index)
            logits = model(input_ids=tokens[None]).logits[0].double()
            total += functional.cross_entropy(logits, labels, reduction="sum").item()
            count += int((labels != -100).sum())
    assert count == sum(ROWS.counts)
    return total / count


def _evaluate(world: World, micro: int) -> float:
    loader = make_loader(ROWS, 4, micro, world.rank, world.size)
    return evaluate_model(tiny_model(), SingleEngine(CPU), TokenObjective(), loader, world).loss


@pytest.mark.parametrize("micro", [1, 2, 8])
def test_mean_over_all_targets_of_all_rows(micro: int) -> None:
    assert _evaluate(World(), micro) == pytest.approx(dense_loss(tiny_model()), rel=1e-6)


@pytest.mark.dist
def test_ranks_agree_though_their_shares_differ() -> None:
    """Five rows on two ranks: one rank has a filler row, which counts for nothing."""
    first, second = run_ranks(_evaluate, 2, 2)
    assert first == second == pytest.approx(dense_loss(tiny_model()), rel=1e-6)


class LabelledEight:
    """Eight rows of two tasks: the first six are of classes 0 and 1, the others of 2 to 4."""

    packed, seq_len, longest, largest_token = False, 4, 4, 96

    def __init__(self, rows: int = 8) -> None:
        self.epoch_ranges = [[(0, rows)]]

    def __len__(self) -> int:
        return 8

    def num_targets(self, index: int) -> int:
        return 1

    def get_sequence(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        target = [index % 2, 0, 2, -1] if index < 6 else [2 + index % 3, 2, 5, -1]
        return torch.arange(4) + 5 * index + 3, torch.tensor(target), torch.zeros(4).long()


def labelled() -> SequenceMixture:
    """As a mixture of six rows and two."""
    mixture = SequenceMixture.__new__(SequenceMixture)
    whole: Any = LabelledEight()
    parts: Any = (LabelledEight(6), LabelledEight(2))
    mixture.task_names, mixture._parts = ("two", "three"), parts
    mixture.starts = np.array([0, 6, 8])
    mixture.get_sequence = whole.get_sequence  # type: ignore[method-assign]
    return mixture


TASKS = (
    ClassTask("two", ("no", "yes"), 0, "yes"),
    ClassTask("three", ("a", "b", "c"), 2),
)


def _scores(world: World, micro: int) -> EvalResult:
    torch.manual_seed(0)
    config = tf.BertConfig(**{**ENCODERS["bert"].to_dict(), "num_labels": 5})
    model = tf.AutoModelForSequenceClassification.from_config(config)
    nn.init.normal_(model.classifier.weight)
    loader = LabelledLoader(
        labelled(),
        global_batch=3,
        micro_batch=micro,
        seed=0,
        shuffle=False,
        data_rank=world.data_rank,
        data_size=world.data_size,
        seq_len=4,
        pad_id=0,
    )
    found = evaluate_model(model, SingleEngine(CPU), ClassificationObjective(TASKS), loader, world)
    if world.size == 1:
        _check_scores(model.eval(), found)
    return found


def _check_scores(model: nn.Module, found: EvalResult) -> None:
    """Row by row, by the definition."""
    rows, losses, right, pairs = LabelledEight(), [], [], []
    for index in range(8):
        tokens, (label, start, stop, _), _ = rows.get_sequence(index)
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0, start:stop]
        losses.append(functional.cross_entropy(logits, label - start).item())
        right.append(int(logits.argmax()) == int(label - start))
        pairs.append((int(logits.argmax()), int(label - start)))
    assert found.loss == pytest.approx(sum(losses) / 8, rel=1e-5)
    assert found.by_task["three"] == pytest.approx(sum(losses[6:]) / 2, rel=1e-5)
    assert found.scores is not None and found.scores.accuracy == sum(right) / 8
    assert found.scores_by_task["two"].accuracy == sum(right[:6]) / 6
    hits = pairs[:6].count((1, 1))
    f1 = 2 * hits / (2 * hits + pairs[:6].count((0, 1)) + pairs[:6].count((1, 0)))
    assert found.scores_by_task["two"].f1 == pytest.approx(f1)
    assert found.scores_by_task["three"].f1 is None and found.scores.f1 is None


@pytest.mark.dist
def test_scores_of_classes() -> None:
    """The same on three ranks, of which two have a filler row in each batch."""
    found = _scores(World(), 2)
    for other in run_ranks(_scores, 3, 1):
        assert other.scores == found.scores and other.scores_by_task == found.scores_by_task
        assert other.loss == pytest.approx(found.loss, rel=1e-6)
    values = found.to_metric_fields("_before")
    assert values.keys() == {
        f"eval_{name}_before"
        for name in (
            "loss",
            "by_task",
            "accuracy",
            "accuracy_by_task",
            "macro_f1",
            "macro_f1_by_task",
            "matthews",
            "matthews_by_task",
            "f1_by_task",
        )
    }
    assert "accuracy" in str(found) and "macro F1" in str(found)


class TestInference:
    def model(self) -> nn.Sequential:
        model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4)))
        model.train()
        model[1].eval()  # the frozen base is in evaluation mode all along
        model[1][0].train()  # an adapter's dropout inside it is not
        return model

    def test_no_dropout_no_gradients(self) -> None:
        model, x = self.model(), torch.ones(3, 4)
        with inference_mode(model):
            assert not any(module.training for module in model.modules())
            y = model(x)
        assert torch.equal(y, model[1][1](x)) and not y.requires_grad

    def test_flags_come_back_after_an_error_too(self) -> None:
        model = self.model()
        before = [module.training for module in model.modules()]
        assert True in before and False in before
        with inference_mode(model):
            pass
        assert [module.training for module in model.modules()] == before
        with pytest.raises(RuntimeError, match="broken"), inference_mode(model):
            raise RuntimeError("broken")
        assert [module.training for module in model.modules()] == before
        assert torch.is_grad_enabled()
