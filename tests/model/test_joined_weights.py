"""Convolutions that the files have in parts: read, trained and merged part by part."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_peft.adapters.full.method import _make_master_parameter
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.export.base_weights import list_base_weights
from dist_peft.model.frozen_linear import FrozenLinear, describe_stored_otherwise
from dist_peft.store.reader import RowReader
from tests.support.loaded_models import IDS, load, logits
from tests.support.tiny_models import CONVERTED, JOINED, save_model

pytestmark = pytest.mark.skipif("olmo_hybrid" not in JOINED, reason="transformers has no such type")


def change_tensors(directory: Path, edit: dict[str, Tensor | None]) -> None:
    tensors = {**load_file(directory / "model.safetensors"), **edit}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", JOINED)
def test_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    original = save_model(JOINED[family], tmp_path)
    loaded = load(tmp_path, quant=None)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(logits(loaded.model, input_ids=ids), logits(original, input_ids=ids))
    parts = [name for name, _ in loaded.model.named_parameters() if "_part_" in name]
    assert len(parts) == 3  # one layer of linear attention
    path = parts[0].rpartition(".")[0]
    assert torch.equal(
        loaded.model.get_submodule(path).weight, original.get_parameter(f"{path}.weight")
    )


def test_each_part_is_a_tensor_of_the_files(tmp_path: Path) -> None:
    save_model(JOINED["olmo_hybrid"], tmp_path)
    loaded = load(tmp_path, quant=None)
    used = {
        source
        for module in loaded.model.modules()
        for source in getattr(module, "checkpoint_names", {}).values()
    }
    convolutions = {name for name in load_file(tmp_path / "model.safetensors") if "conv1d" in name}
    assert len(convolutions) == 3 and convolutions <= used


def test_a_part_that_is_absent_is_named(tmp_path: Path) -> None:
    save_model(JOINED["olmo_hybrid"], tmp_path)
    (lost,) = [n for n in load_file(tmp_path / "model.safetensors") if "k_conv1d" in n]
    change_tensors(tmp_path, {lost: None})
    with pytest.raises(UserError, match=r"conv1d\.weight .*_conv1d\.weight \(Concatenate\)"):
        load(tmp_path, quant=None)


def test_parts_of_other_sizes_are_refused(tmp_path: Path) -> None:
    save_model(JOINED["olmo_hybrid"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (name,) = [n for n in tensors if "k_conv1d" in n]
    change_tensors(tmp_path, {name: tensors[name][:-1].contiguous()})
    with pytest.raises(UserError, match="Concatenate"):
        load(tmp_path, quant=None)


def test_a_joined_weight_in_the_files_stays_one(tmp_path: Path) -> None:
    original = save_model(JOINED["olmo_hybrid"], tmp_path)
    original.save_pretrained(tmp_path, save_original_format=False)
    loaded = load(tmp_path, quant=None)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(logits(loaded.model, input_ids=ids), logits(original, input_ids=ids))
    assert not [name for name, _ in loaded.model.named_parameters() if "_part_" in name]


@pytest.mark.skipif("minimax_m3_vl" not in CONVERTED, reason="transformers has no such type")
def test_a_linear_in_two_tensors(tmp_path: Path) -> None:
    """Its rows are read from both, across their border; trained or not, it is one linear."""
    original = save_model(CONVERTED["minimax_m3_vl"], tmp_path, auto=tf.AutoModelForImageTextToText)
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded.model, input_ids=IDS), logits(original, input_ids=IDS))
    path = "model.language_model.layers.1.mlp.shared_experts.gate_up_proj"
    linear = loaded.model.get_submodule(path)
    assert isinstance(linear, FrozenLinear) and [len(p.span) for p in linear.pieces] == [40, 40]
    whole = original.get_parameter(f"{path}.weight").detach()
    with RowReader(loaded.index) as reader:
        for span in (Span(0, 80), Span(31, 52), Span(70, 70)):
            assert torch.equal(linear.read_packed_rows(reader, span), whole[span.slice])
    weights = [w for w in list_base_weights(loaded) if w.linear is linear]
    assert [w.span_in_linear(Span(0, w.num_rows)) for w in weights] == [Span(0, 40), Span(40, 80)]
    with pytest.raises(UserError, match="would learn, but the files have it as several tensors"):
        _make_master_parameter(path, linear, "packed")
    reason = describe_stored_otherwise(loaded.model)
    assert reason is not None and "several tensors in its files" in reason
