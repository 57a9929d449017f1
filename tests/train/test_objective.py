"""Objectives: inputs of a batch, statistics of its rows, and no kind of batch known elsewhere."""

import ast
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch.nn import functional

from dist_peft.data.classification import LabelledBatch
from dist_peft.data.loader import Batch
from dist_peft.train.objective import ClassificationObjective, TokenObjective
from tests.support.tiny_models import CONFIGS, ENCODERS

CPU = torch.device("cpu")
PACKAGE = Path(__file__).parents[2] / "dist_peft"


@pytest.mark.parametrize("family", [*ENCODERS, "llama"])
def test_padding_of_labelled_rows_changes_nothing(family: str) -> None:
    """Short rows give what they give alone, and a row of nothing but padding gives numbers."""
    config = {**ENCODERS, "llama": CONFIGS["llama"]}[family]
    model = tf.AutoModelForSequenceClassification.from_config(config).eval()
    ids = torch.arange(20, 44).view(3, 8)
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] + [0] * 7])
    ids = ids.where(mask.bool(), torch.tensor(config.pad_token_id))
    ids[2] = config.pad_token_id
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]] * 3) * mask
    batch = LabelledBatch(
        ids,
        torch.tensor([[0], [1], [-100]]),
        torch.arange(8).expand(3, -1),
        torch.tensor([0, 1, -1]),
        mask,
        types,
        torch.tensor([[0, 2]] * 3),
    )
    inputs = ClassificationObjective().build_inputs(model, batch, CPU)
    assert ("token_type_ids" in inputs) == (family == "bert")
    with torch.no_grad():
        whole = model(**inputs).logits
        short = {name: value[1:2, :5] for name, value in inputs.items()}
        alone = model(**short).logits
    torch.testing.assert_close(whole[1:2], alone, rtol=0, atol=1e-6)
    assert whole.isfinite().all()


def token_batch() -> Batch:
    """A packed row of two documents, a row with padding, and a filler row."""
    ids = torch.arange(10, 34).view(3, 8)
    labels = ids + 1
    labels[0, 3], labels[1, 5:], labels[2] = -100, -100, -100
    positions = torch.arange(8).repeat(3, 1)
    positions[0] = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    return Batch(ids, labels, positions, torch.tensor([4, 7, -1]))


def test_token_loss_and_its_statistics() -> None:
    """Documents of a packed row are isolated; each row's sum is that of the definition."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    batch, objective = token_batch(), TokenObjective()
    with torch.no_grad():
        logits = objective.compute_logits(model, batch, CPU)
        alone = model(input_ids=batch.input_ids[:1, 4:]).logits
    torch.testing.assert_close(logits[:1, 4:], alone, rtol=1e-5, atol=1e-6)
    losses = functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
    with torch.no_grad():
        statistics = objective.compute_row_statistics(model, batch, CPU)
        loss = objective.compute_loss(model, batch, CPU, model)
    assert statistics.dtype == torch.float64 and statistics[:, 1].tolist() == [7, 5, 0]
    torch.testing.assert_close(statistics[:, 0], losses.sum(1).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, losses.sum())
    assert objective.compute_scores(statistics.sum(0)[2:]) is None
    assert objective.mark_measured_tokens(batch).sum(1).tolist() == [7, 5, 0]


def test_the_call_replaces_the_model() -> None:
    """An engine's wrapper computes, the model behind it says which mask it needs."""
    model = tf.AutoModelForCausalLM.from_config(CONFIGS["opt"]).eval()
    model.config.dtype = torch.float32

    class Wrapper(torch.nn.Module):
        def forward(self, **inputs: torch.Tensor) -> object:
            assert "attention_mask" in inputs
            return type("Output", (), {"logits": torch.full((3, 8, 5), 2.0)})

    logits = TokenObjective().compute_logits(model, token_batch(), CPU, Wrapper())
    assert logits.eq(2).all()


CHECKS = ("isinstance", "issubclass")
KINDS = {
    *("Batch", "LabelledBatch", "Loader", "TokenLoader", "LabelledLoader", "SequenceSet"),
    *("LabelledSequences", "ChoiceSequences", "SequenceMixture", "SingleTask"),
    *("TokenObjective", "ClassificationObjective", "DomainObjective"),
}


def test_no_code_asks_for_the_kind_of_a_batch_or_data_set() -> None:
    """What depends on the kind is a method of the objective or a property of the data set."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if not any(name in text for name in CHECKS):
            continue
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in CHECKS
            ):
                asked = {ast.unparse(n).rpartition(".")[2] for n in ast.walk(node.args[1])}
                found += [f"{path.name}:{node.lineno}: {name}" for name in asked & KINDS]
    assert found == []
