"""``store.fingerprint``: what config.json means, and where samples are taken."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dist_peft.core.errors import UserError
from dist_peft.store.fingerprint import read_config_meaning, select_config_meaning
from dist_peft.store.index import SafetensorsIndex

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "text_config": {"hidden_size": 64, "dtype": "bfloat16"},
}


def print_of(directory: Path, config: dict[str, Any]) -> str:
    directory.mkdir(exist_ok=True)
    save_file({"a": torch.arange(12.0)}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return SafetensorsIndex.open(directory).compute_fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 500000.0},
        {"rms_norm_eps": 1e-6},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"text_config": {"hidden_size": 65}},
        {"sliding_window": 128},
        {"tie_word_embeddings": True},
        {"hidden_act": "gelu"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_the_function_is_seen(tmp_path: Path, change: dict[str, Any]) -> None:
    assert print_of(tmp_path / "a", CONFIG) != print_of(tmp_path / "b", {**CONFIG, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"transformers_version": "9.9", "_name_or_path": "elsewhere", "architectures": ["X"]},
        {"torch_dtype": "float32", "text_config": {"hidden_size": 64, "dtype": "float32"}},
        {"eos_token_id": 7, "use_cache": False},
        {"rope_theta": 10000},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_does_not_is_not(tmp_path: Path, change: dict[str, Any]) -> None:
    reordered = dict(reversed({**CONFIG, **change}.items()))
    assert print_of(tmp_path / "a", CONFIG) == print_of(tmp_path / "b", reordered)


def test_meaning_keeps_keys_to_name_them() -> None:
    assert select_config_meaning(CONFIG) == {
        "model_type": "llama",
        "rope_theta": 10000,
        "rms_norm_eps": 1e-5,
        "text_config": {"hidden_size": 64},
    }


def test_damaged_configuration(tmp_path: Path) -> None:
    assert read_config_meaning(tmp_path) == {}
    for text in ("{", "[1]", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json (is not valid JSON|does not hold)"):
            read_config_meaning(tmp_path)


def test_thousands_of_tensors_are_read_in_few_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    tensors = {f"t{n}": torch.full((300,), n, dtype=torch.int32) for n in range(5000)}
    save_file(tensors, tmp_path / "model.safetensors")
    index = SafetensorsIndex.open(tmp_path)

    def counted(descriptor: int, into: memoryview, *_: object) -> None:
        calls.append(len(into))

    monkeypatch.setattr("dist_peft.store.fingerprint.read_exactly", counted)
    index.compute_fingerprint()
    assert 5000 <= len(calls) <= 8000 and sum(calls) < 5 * 400_000
