from pathlib import Path

import torch
import transformers as tf
from torch import nn

from dist_peft.core.config.io import parse_config
from dist_peft.data.classification import LabelledBatch
from dist_peft.model.document_attention import DOCUMENT_ATTENTION
from dist_peft.plan.traced_batch import build_traced_batch
from dist_peft.train.objective import ClassificationObjective, TokenObjective
from tests.support.live_storage import odd_classifier_tree, odd_tree

IDS = torch.arange(2)


def make_model(attention: str) -> nn.Module:
    model = nn.Module()
    model.config = tf.LlamaConfig(num_labels=3)  # type: ignore[assignment]
    model.config._attn_implementation = attention
    return model


def test_rows_of_tokens_hold_two_documents_unless_attention_takes_them_at_once(
    tmp_path: Path,
) -> None:
    config = parse_config(odd_tree(tmp_path))
    for attention, device, documents in (
        ("sdpa", "cuda", 2),
        (DOCUMENT_ATTENTION, "cpu", 2),
        (DOCUMENT_ATTENTION, "cuda", 1),
    ):
        objective, batch = build_traced_batch(make_model(attention), config, IDS, device)
        assert isinstance(objective, TokenObjective) and batch.is_packed
        assert batch.input_ids.shape == batch.position_ids.shape == (2, 96)
        assert (batch.labels != -100).sum() == 2 * 95
        assert (batch.position_ids == 0).sum() == 2 * documents


def test_rows_of_classes_have_their_padding(tmp_path: Path) -> None:
    config = parse_config(odd_classifier_tree(tmp_path))
    objective, batch = build_traced_batch(make_model("sdpa"), config, IDS, "cpu")
    assert isinstance(objective, ClassificationObjective) and isinstance(batch, LabelledBatch)
    assert batch.attention_mask.sum(1).tolist() == [96, 95]
    assert batch.ranges.tolist() == [[0, 3]] * 2 and batch.labels.shape == (2, 1)
