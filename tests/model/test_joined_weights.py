"""Convolutions that the files have in parts: read, trained and merged part by part."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_peft.core.errors import UserError
from tests.support.loaded_models import load, logits
from tests.support.tiny_models import JOINED, save_model

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
