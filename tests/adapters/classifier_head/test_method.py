"""A head beside any method: what learns, where it starts, what is written."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from dist_peft.adapters.classifier_head.method import (
    HeadedAdapter,
    HeadPart,
    HeadSpec,
    add_classifier_head,
)
from dist_peft.adapters.method_table import make_adapter
from dist_peft.adapters.protocol import TrainsBaseWeights
from dist_peft.core.config.run import BaseConfig, RunConfig
from dist_peft.core.span import Span, row_span
from dist_peft.core.trainable_steps import ALWAYS
from dist_peft.engine.engine_protocol import trainable_parameters
from dist_peft.engine.single import SingleEngine
from dist_peft.model.load import load_model
from dist_peft.model.skeleton import Skeleton, build_skeleton
from dist_peft.store.reader import RowReader
from tests.support.tiny_models import ENCODERS, save_model

LABELS = ("no", "yes", "perhaps")
CPU = torch.device("cpu")


def headed(directory: Path, **adapter: Any) -> tuple[Skeleton, HeadedAdapter]:
    """A skeleton with the method attached; parameters on meta."""
    base = BaseConfig(path=str(directory), head="classifier", compute_dtype="float32", quant=None)
    skeleton = build_skeleton(base, directory, LABELS)
    assert skeleton.head is not None
    source = {"path": "f.tsv", "format": "classification", "labels": LABELS}
    tree = {"base": base.model_dump(), "adapter": adapter, "data": {"train": [source]}}
    config = RunConfig.model_validate(tree).adapter
    method = make_adapter(config, seed=0, arithmetic=torch.float32)
    adapted = add_classifier_head(method, skeleton.head, seed=0, arithmetic=torch.float32)
    adapted.attach_to_model(skeleton.model)
    return skeleton, adapted


def load(skeleton: Skeleton) -> torch.nn.Module:
    engine = SingleEngine(CPU)
    engine.shard_model(skeleton.model, skeleton.blocks)
    with RowReader(skeleton.index) as reader:
        load_model(skeleton.model, reader, engine, CPU)
    return skeleton.model


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "r": 2},
    "partial": {"kind": "partial", "parts": ["norms", "head"]},
}


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("method", METHODS)
def test_same_logits_as_transformers(family: str, method: str, tmp_path: Path) -> None:
    """From a trained classifier the head starts where the files say, and computes the same."""
    config = type(ENCODERS[family])(**{**ENCODERS[family].to_dict(), "num_labels": 3})
    original = save_model(config, tmp_path, auto=tf.AutoModelForSequenceClassification)
    skeleton, adapter = headed(tmp_path, **METHODS[method])
    assert skeleton.head is not None and not skeleton.head.new
    model = load(skeleton)
    ids = torch.arange(20, 32).view(2, 6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    got, want = (m(input_ids=ids, attention_mask=mask).logits for m in (model, original))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    learns = trainable_parameters(model)
    head = {f"{path}.{name}" for path, part in adapter.parts.items() for name in part.shapes}
    assert head < learns.keys() and all(learns[n].dtype == torch.float32 for n in head)
    names = [n for n, _ in original.named_parameters() if n.startswith(("classifier", "head"))]
    assert sorted(names) == sorted(head)
    got.sum().backward()
    assert all(learns[name].grad is not None for name in head)
    assert isinstance(adapter, TrainsBaseWeights) == (method == "partial")


def test_new_parameters_start_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    save_model(ENCODERS["modernbert"], tmp_path, auto=tf.AutoModel)
    _, adapter = headed(tmp_path, kind="lora")
    part = adapter.parts["head.dense"]
    whole = part.init_rows("weight", Span(0, 64))
    rows = [part.init_rows("weight", row_span(64, 3, rank)) for rank in range(3)]
    assert torch.equal(torch.cat(rows), whole)
    assert whole.std() == pytest.approx(0.02, rel=0.05)  # initializer_range
    other = adapter.parts["classifier"]
    assert not torch.equal(other.init_rows("weight", Span(0, 3)), whole[:3])
    assert torch.equal(other.init_rows("bias", Span(1, 3)), torch.zeros(2))
    assert torch.equal(adapter.parts["head.norm"].init_rows("weight", Span(0, 2)), torch.ones(2))


def test_computes_in_the_arithmetic_type(tmp_path: Path) -> None:
    """Rounded copies; gradients of the float32 masters; what comes out has the input's type."""
    linear = torch.nn.Linear(8, 2)
    linear.checkpoint_names = {}
    part = HeadPart(linear, "classifier", HeadSpec(0.02, torch.bfloat16, 0))
    master = {n: torch.randn(s) for n, s in part.shapes.items()}
    part.load_state_dict(master, assign=True)
    for parameter in part.parameters():
        parameter.requires_grad_()
    x = torch.randn(3, 8)
    y = part(x)
    weight, bias = master["weight"].bfloat16(), master["bias"].bfloat16()
    expected = torch.nn.functional.linear(x.bfloat16(), weight, bias)
    assert y.dtype == torch.float32 and torch.equal(y, expected.float())
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in part.parameters())
    assert "in_features=8" in repr(part) and not list(linear.parameters())


def test_public_form(tmp_path: Path) -> None:
    save_model(ENCODERS["bert"], tmp_path, auto=tf.AutoModelForMaskedLM)
    skeleton, adapter = headed(tmp_path, kind="lora", r=2, lr_ratio=4.0)
    model = load(skeleton)
    tensors = {name: p.detach() for name, p in trainable_parameters(model).items()}
    public = adapter.to_public_adapter(tensors, "some/base")
    assert public.head is not None and public.head.labels == LABELS
    assert sorted(public.head.tensors) == [
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "classifier.bias",
        "classifier.weight",
    ]
    assert not any("classifier" in name for name in public.tensors)
    assert adapter.get_lr_scale("classifier.weight") == 1.0
    lora_b = next(name for name in tensors if name.endswith("lora_B"))
    assert adapter.get_lr_scale(lora_b) == 4.0
    with pytest.raises(RuntimeError, match=r"classifier.bias is absent"):
        adapter.to_public_adapter({n: t for n, t in tensors.items() if n != "classifier.bias"}, "b")


def test_trained_weights_have_names(tmp_path: Path) -> None:
    """Those of the files, or the model's for what the files lack."""
    save_model(ENCODERS["modernbert"], tmp_path, auto=tf.AutoModelForMaskedLM)
    _, adapter = headed(tmp_path, kind="partial", parts=["head"])
    assert isinstance(adapter, TrainsBaseWeights)
    own = {"head.dense.weight", "head.norm.weight", "classifier.weight", "classifier.bias"}
    assert adapter.list_source_tensors() == {name: name for name in own}
    assert adapter.get_trainable_steps("classifier.weight") == ALWAYS
    stored = load_file(tmp_path / "model.safetensors")
    assert "head.dense.weight" in stored and "classifier.weight" not in stored
