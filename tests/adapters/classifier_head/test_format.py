"""A head in PEFT's files and in AdapterHub's; real PEFT's own are read."""

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from dist_peft.adapters.classifier_head.format import join_peft_head, read_head, split_peft_head
from dist_peft.adapters.directory import (
    open_adapter_merger,
    read_adapter_directory,
    write_adapter_directory,
)
from dist_peft.adapters.protocol import PublicAdapter, PublicHead
from dist_peft.core.errors import UserError
from tests.support.bottlenecks import public as public_bottleneck
from tests.support.tiny_models import ENCODERS, save_model

HEAD = {
    "bert.pooler.dense.weight": torch.ones(4, 4),
    "classifier.weight": torch.ones(3, 4),
    "classifier.bias": torch.zeros(3),
}
LABELS = ("a", "b", "c")
A, B = (f"base_model.model.bert.q.lora_{f}.weight" for f in "AB")


def public() -> PublicAdapter:
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "modules_to_save": None}
    return PublicAdapter(config, {A: torch.ones(2, 4)}, head=PublicHead(LABELS, HEAD))


def test_joined_and_split() -> None:
    config, tensors = join_peft_head(public())
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["bert.pooler", "classifier"]
    assert "base_model.model.classifier.weight" in tensors and A in tensors
    method, others, head = split_peft_head(config, tensors, LABELS)
    assert others.keys() == {A} and method["modules_to_save"] is None
    assert head is not None and head.labels == LABELS and head.tensors.keys() == HEAD.keys()
    assert read_head(HEAD, ()).labels == ("0", "1", "2")


def test_another_heads_modules_stay() -> None:
    """A language model's saved module is no head of a classifier, and merges refuse it."""
    config, tensors = join_peft_head(public())
    language = {**config, "task_type": "CAUSAL_LM"}
    assert split_peft_head(language, tensors, ()) == (language, tensors, None)


def test_pefts_own_directory(tmp_path: Path) -> None:
    save_model(ENCODERS["roberta"], tmp_path / "base", auto=tf.AutoModel)
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "theirs")
    found = read_adapter_directory(tmp_path / "theirs")
    assert found.head is not None and found.head.labels == ("0", "1", "2")
    expected = {n: p for n, p in model.state_dict().items() if "original" not in n}
    assert sorted(found.head.tensors) == [
        f"classifier.{m}.{p}" for m in ("dense", "out_proj") for p in ("bias", "weight")
    ]
    for name, value in found.head.tensors.items():
        saved = name.replace("classifier.", "classifier.modules_to_save.default.")
        assert torch.equal(value, expected[saved])
    assert open_adapter_merger(tmp_path / "theirs").changes_weight(
        "roberta.encoder.layer.0.attention.self.query.weight"
    )
    write_adapter_directory(tmp_path / "ours", found, {"labels": LABELS})
    again = read_adapter_directory(tmp_path / "ours")
    assert again.head is not None and again.head.labels == LABELS
    theirs, ours = (
        load_file(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "ours")
    )
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[n], ours[n]) for n in ours)


def test_adapterhubs_files(tmp_path: Path) -> None:
    """Beside the adapter, in files of their own."""
    with_head = replace(public_bottleneck(), head=PublicHead(LABELS, HEAD, "BertForClasses"))
    write_adapter_directory(tmp_path, with_head, {"labels": LABELS})
    about = json.loads((tmp_path / "head_config.json").read_text())
    assert about["config"] is None and about["name"] is None and about["num_labels"] == 3
    assert about["label2id"] == {"a": 0, "b": 1, "c": 2}
    assert about["model_class"] == "BertForClasses" and about["version"].startswith("adapters.1.")
    assert load_file(tmp_path / "model_head.safetensors").keys() == HEAD.keys()
    again = read_adapter_directory(tmp_path)
    assert again.head is not None and again.head.labels == LABELS
    assert again.tensors.keys() == with_head.tensors.keys()
    (tmp_path / "model_head.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model_head.safetensors, the head of the classes"):
        read_adapter_directory(tmp_path)
