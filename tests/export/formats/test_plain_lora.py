"""Factors of every kind of LoRA of linears; everything else is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_peft.core.config.run import LoraConfig, PrefixConfig
from dist_peft.core.errors import UserError
from dist_peft.export.formats.plain_lora import find_plain_lora_obstacle, read_plain_lora
from tests.support.adapters import adapted, disturb, save, tiny_llama


def save_lora(directory: Path, **settings: Any) -> tuple[Path, Any]:
    model, adapter = adapted(tiny_llama(), **settings)
    disturb(model)
    return save(model, adapter, directory), model


@pytest.mark.parametrize(
    "settings", [{"r": 4, "alpha": 6}, {"r": 4, "alpha": 6, "use_rslora": True}], ids=str
)
def test_change_is_that_of_the_model(settings: dict[str, Any], tmp_path: Path) -> None:
    directory, model = save_lora(tmp_path, **settings)
    factors = read_plain_lora(directory, "x")
    for path, one in factors.items():
        layer = model.get_submodule(path)
        inputs = torch.eye(one.A.shape[1])
        change = (layer(inputs) - layer.base(inputs)).T
        torch.testing.assert_close(one.scaled_B @ one.A, change, rtol=1e-4, atol=1e-6)
        assert one.rank == 4
    assert factors


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "DoRA's magnitudes"),
        ({"embeddings": True}, "an embedding, model.embed"),
    ],
)
def test_more_than_lora_of_linears(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    directory, _ = save_lora(tmp_path, r=4, **settings)
    with pytest.raises(UserError, match=f"format x holds LoRA of linears alone.*{reason}"):
        read_plain_lora(directory, "x")


def test_other_methods(tmp_path: Path) -> None:
    directory, _ = save_lora(tmp_path, r=4)
    (directory / "dist_peft.json").unlink()
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": "IA3"}))
    with pytest.raises(UserError):
        read_plain_lora(directory, "x")


def test_obstacles_before_training() -> None:
    model = tiny_llama()
    assert find_plain_lora_obstacle(LoraConfig(), model) is None
    for config, reason in (
        (LoraConfig(use_dora=True), "adapter.use_dora"),
        (LoraConfig(embeddings=True), "adapter.embeddings"),
        (PrefixConfig(num_virtual_tokens=2), "not adapter.kind prefix"),
    ):
        assert reason in str(find_plain_lora_obstacle(config, model))
