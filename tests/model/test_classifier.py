"""Skeletons of classifiers: what the head is, and what the files may lack or have beside."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.model.classifier import choose_pad_token_id, reads_token_types, set_pad_token
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.hub import load_tokenizer
from dist_peft.model.skeleton import Skeleton, build_skeleton
from tests.support.tiny_models import CONFIGS, ENCODERS, save_model
from tests.support.tiny_runs import save_words

LABELS = ("no", "yes", "perhaps")

LAST = {"classifier.weight", "classifier.bias"}
POOLER = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
TRANSFORM = {"head.dense.weight", "head.norm.weight"}
ROBERTA = {f"classifier.{m}.{p}" for m in ("dense", "out_proj") for p in ("weight", "bias")}
CASES: list[tuple[str, Any, set[str], set[str]]] = [
    ("bert", tf.AutoModel, LAST, set()),  # a pooler that the files have is the trunk's
    ("bert", tf.AutoModelForMaskedLM, LAST | POOLER, set()),
    ("roberta", tf.AutoModel, ROBERTA, set()),
    ("roberta", tf.AutoModelForMaskedLM, ROBERTA, set()),
    ("modernbert", tf.AutoModel, LAST | TRANSFORM, set()),
    ("modernbert", tf.AutoModelForMaskedLM, LAST | TRANSFORM, TRANSFORM),
]
"""Family, what was saved, parameters of the head, those of them in the files."""


def skeleton_of(directory: Path, **changes: Any) -> Skeleton:
    fields = {"path": str(directory), "head": "classifier", "compute_dtype": "float32"} | changes
    return build_skeleton(BaseConfig(**fields), directory, LABELS)


@pytest.mark.parametrize(("family", "auto", "names", "in_files"), CASES)
def test_head_of_an_encoder(
    family: str,
    auto: Any,
    names: set[str],
    in_files: set[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From files of another head, or of none: the blocks are quantized, the head is new or read."""
    save_model(ENCODERS[family], tmp_path, auto=auto)
    with caplog.at_level(logging.WARNING):
        skeleton = skeleton_of(tmp_path)
    assert not caplog.records
    head, model = skeleton.head, skeleton.model
    assert head is not None and head.labels == LABELS
    assert model.config.num_labels == 3 and model.config.id2label[2] == "perhaps"
    mine = {f"{p}.{n}" for p in head.modules for n, _ in model.get_submodule(p).named_parameters()}
    assert mine == names
    assert set(head.new) == names - in_files
    assert len(skeleton.blocks) == 2
    for block in skeleton.blocks:
        linears = [m for m in block.modules() if isinstance(m, torch.nn.Linear | FrozenLinear)]
        assert linears and all(isinstance(m, FrozenLinear) for m in linears)
    assert not any("cls." in n or "lm_head" in n or "decoder" in n for n in skeleton.tensors)
    assert list(skeleton.tensors)[len(skeleton.tensors) - len(head.new) :] == list(head.new)
    assert reads_token_types(model) == (family == "bert")
    assert skeleton.max_positions == 64 and skeleton.has_learned_positions == (
        family != "modernbert"
    )


def test_head_of_a_decoder(tmp_path: Path) -> None:
    """The language model's head is left out; a classifier of other classes starts anew."""
    save_model(CONFIGS["llama"], tmp_path / "lm")
    skeleton = skeleton_of(tmp_path / "lm")
    assert skeleton.head is not None and skeleton.head.new == ("score.weight",)
    assert (
        "lm_head.weight" not in skeleton.tensors and skeleton.tensors["score.weight"].num_rows == 3
    )

    trained = tf.AutoModelForSequenceClassification
    for classes, new in ((3, ()), (2, ("score.weight",))):
        config = tf.LlamaConfig(**CONFIGS["llama"].to_dict() | {"num_labels": classes})
        save_model(config, tmp_path / str(classes), auto=trained)
        found = skeleton_of(tmp_path / str(classes)).head
        assert found is not None and found.new == new and found.modules == ("score",)


def test_padding(tmp_path: Path) -> None:
    save_model(CONFIGS["llama"], tmp_path)
    save_words(tmp_path)
    model, tokenizer = skeleton_of(tmp_path).model, load_tokenizer(tmp_path)
    assert choose_pad_token_id(tokenizer) == 0
    tokenizer.pad_token = None
    set_pad_token(model, tokenizer)
    assert model.config.pad_token_id == tokenizer.eos_token_id == 2


def test_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model(ENCODERS["bert"], tmp_path / "bert", auto=tf.AutoModel)
    with pytest.raises(UserError, match=r"is an encoder \(bert\).*set base.head: classifier"):
        skeleton_of(tmp_path / "bert", head="lm")
    small = tf.BertConfig(**ENCODERS["bert"].to_dict() | {"num_hidden_layers": 1})
    small.save_pretrained(tmp_path / "bert")
    with caplog.at_level(logging.WARNING):
        skeleton_of(tmp_path / "bert")
    assert "weights that a BertForSequenceClassification" in caplog.text
    large = tf.BertConfig(**ENCODERS["bert"].to_dict() | {"num_hidden_layers": 3})
    large.save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match=r"lacks 16 tensors .* such as bert.encoder.layer.2"):
        skeleton_of(tmp_path / "bert")

    albert = tf.AlbertConfig(
        vocab_size=97, embedding_size=16, hidden_size=32, num_attention_heads=2, num_hidden_layers=3
    )
    save_model(albert, tmp_path / "albert", auto=tf.AutoModel)
    with pytest.raises(UserError, match="AlbertForSequenceClassification is not known here"):
        skeleton_of(tmp_path / "albert")
    both = tf.BartConfig(
        vocab_size=97,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    save_model(both, tmp_path / "bart", auto=tf.AutoModel)
    with pytest.raises(UserError, match="bart has an encoder and a decoder"):
        skeleton_of(tmp_path / "bart")
