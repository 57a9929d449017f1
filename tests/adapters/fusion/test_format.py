import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_peft.adapters.bottleneck.format import ModelDescription
from dist_peft.adapters.directory import (
    check_public_adapter,
    open_adapter_merger,
    read_adapter_directory,
    write_adapter_directory,
)
from dist_peft.adapters.fusion.format import (
    is_fusion_config,
    list_fused_names,
    parse_fusion_tensors,
    to_public_fusion,
)
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.errors import UserError

D = 4
PLACE = "bert.encoder.layer.0.output"
DYNAMIC: dict[str, Any] = {
    "dropout_prob": None,
    "key": True,
    "query": True,
    "query_before_ln": False,
    "regularization": True,
    "residual_before": False,
    "temperature": False,
    "value": True,
    "value_before_softmax": True,
    "value_initialized": True,
}
"""``config`` as adapters 1.3.0 writes it for the preset dynamic."""


def own() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    matrices, biases = ("query_weight", "key_weight", "value_change"), ("query_bias", "key_bias")
    shapes = {**dict.fromkeys(matrices, (D, D)), **dict.fromkeys(biases, (D,))}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def public() -> PublicAdapter:
    described = ModelDescription("tiny/base", "BertForSequenceClassification", "bert", D)
    layers = {f"{PLACE}.output_adapters": own()}
    return to_public_fusion(["a", "b"], described, layers, {}, regularized=True, dropout=0.0)


def test_written_as_the_library_does(tmp_path: Path) -> None:
    write_adapter_directory(tmp_path, public(), {})
    config = json.loads((tmp_path / "adapter_fusion_config.json").read_text())
    assert config == {
        "adapter_names": ["a", "b"],
        "config": DYNAMIC,
        "hidden_size": D,
        "model_class": "BertForSequenceClassification",
        "model_name": "tiny/base",
        "model_type": "bert",
        "name": "a,b",
        "version": "adapters.1.3.0",
    }
    tensors, mine = load_file(tmp_path / "model_adapter_fusion.safetensors"), own()
    assert {key: list(value.shape) for key, value in tensors.items()} == {
        f"{PLACE}.adapter_fusion_layer.a,b.{name}": [D] * (1 + name.endswith("weight"))
        for name in ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight")
    }
    value = tensors[f"{PLACE}.adapter_fusion_layer.a,b.value.weight"]
    assert torch.equal(value, torch.eye(D) + mine["value_change"])
    assert not (tmp_path / "adapter_config.json").exists()


def test_read_as_written(tmp_path: Path) -> None:
    write_adapter_directory(tmp_path, public(), {})
    found = read_adapter_directory(tmp_path)
    assert is_fusion_config(found.config) and list_fused_names(found.config) == ["a", "b"]
    assert list_fused_names({"name": "a,b"}) == ["a", "b"]
    (read,) = parse_fusion_tensors(found).items()
    assert read[0] == f"{PLACE}.output_adapters"
    for name, value in own().items():
        torch.testing.assert_close(read[1][name], value, rtol=0, atol=1e-6)
    assert not is_fusion_config({"config": {"mh_adapter": True}}) and not is_fusion_config({})
    with pytest.raises(UserError, match="a fusion of bottlenecks: between its matrices"):
        open_adapter_merger(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", True), ("value", False), ("query_before_ln", True), ("residual_before", True)],
)
def test_other_fusions_are_refused(key: str, value: bool) -> None:
    """Such as the preset static, which has no value."""
    made = public()
    other = replace(made, config={**made.config, "config": {**DYNAMIC, key: value}})
    with pytest.raises(UserError, match=f"{key} is {value}, not .*its preset dynamic are read"):
        check_public_adapter(other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("empty", r"query\.bias has shape \[0\], not \[4\]"),
        ("absent", r"no query_bias of bert\.encoder\.layer\.0\.output\.output_adapters"),
        ("foreign", "x is none of the fusion a,b's"),
        ("none", "has no tensors: it was saved without its data"),
    ],
)
def test_damaged(change: str, words: str) -> None:
    made = public()
    key, tensors = f"{PLACE}.adapter_fusion_layer.a,b.query.bias", dict(made.tensors)
    if change == "empty":
        tensors[key] = torch.empty(0)
    elif change == "absent":
        del tensors[key]
    elif change == "foreign":
        tensors["x"] = torch.zeros(1)
    else:
        tensors = {}
    with pytest.raises(UserError, match=words):
        check_public_adapter(replace(made, tensors=tensors))


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    write_adapter_directory(tmp_path, public(), {})
    (tmp_path / "model_adapter_fusion.safetensors").unlink()
    (tmp_path / "pytorch_model_adapter_fusion.bin").touch()
    with pytest.raises(UserError, match=r"pickle.*save_adapter_fusion\(\.\.\., use_safe"):
        read_adapter_directory(tmp_path)
