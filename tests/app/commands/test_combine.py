"""``dist-peft combine`` on two runs, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dist_peft.adapters.directory import read_adapter_directory
from dist_peft.adapters.metadata import read_adapter_metadata
from dist_peft.app import cli
from dist_peft.app.commands.train import train_from_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World
from tests.support.tiny_runs import tiny_tree


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs on one base, with other seeds."""
    directory = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        save = {"dir": str(directory / f"run{seed}"), "every": 0}
        assert (
            train_from_config(
                parse_config(tiny_tree(directory, train__seed=seed, save=save)), World()
            )
            == 0
        )
    return directory / "run1", directory / "run2"


def combine(*argv: object) -> int:
    return cli.main(["combine", *map(str, argv)])


def test_two_runs(runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert combine(*runs, "--out", tmp_path / "sum", "--weights", 0.5, 0.5) == 0
    combined = read_adapter_directory(tmp_path / "sum")
    assert combined.config["r"] == 8
    about, first = (
        read_adapter_metadata(tmp_path / "sum"),
        read_adapter_metadata(runs[0] / "adapter"),
    )
    assert about["base_fingerprint"] == first["base_fingerprint"]
    assert about["combined"] == [["adapter", 0.5], ["adapter", 0.5]]
    argv = ["--method", "ties", "--density", 0.3, "--rank", 4]
    assert combine(*runs, "--out", tmp_path / "ties", *argv) == 0
    assert read_adapter_directory(tmp_path / "ties").config["r"] == 4


def _compute_changes(directory: Path) -> dict[str, Tensor]:
    """Dense changes ``alpha / r B A`` of a plain LoRA adapter, by module."""
    about = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    scale = about["lora_alpha"] / about["r"]
    return {
        name: scale * tensors[name.replace("lora_A", "lora_B")] @ value
        for name, value in tensors.items()
        if "lora_A" in name
    }


def test_negative_weights_take_a_task_away(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """Task arithmetic (Ilharco et al. 2022): negation, and a task less another one."""
    first, second = (_compute_changes(run / "adapter") for run in runs)
    assert combine(runs[0], "--out", tmp_path / "negated", "--weights", -1) == 0
    assert combine(*runs, "--out", tmp_path / "less", "--weights", 1, -0.25) == 0
    negated, less = (_compute_changes(tmp_path / name) for name in ("negated", "less"))
    assert negated.keys() == less.keys() == first.keys()
    for name, change in first.items():
        assert change.any()
        torch.testing.assert_close(negated[name], -change)
        torch.testing.assert_close(less[name], change - 0.25 * second[name])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--weights", "1"], "--weights has 1 numbers for 2 adapters"),
        (["--density", "0.5"], "--density is for --method ties or dare"),
        (["--seed", "1", "--method", "ties"], "--seed is for --method dare"),
        (["--density", "0", "--method", "ties"], "--density 0.0 is not above 0"),
        (["--rank", "0"], "--rank 0 is not at least 1"),
    ],
)
def test_options_that_are_refused(
    runs: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    words: str,
) -> None:
    assert combine(*runs, "--out", tmp_path / "out", *argv) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_directories_that_are_refused(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert combine(runs[0], tmp_path, "--out", tmp_path / "out") == 2
    assert "has no adapter_config.json" in capsys.readouterr().err
    assert combine(runs[0], runs[0] / "adapter", "--out", tmp_path / "out") == 2
    assert "an adapter is named twice" in capsys.readouterr().err
    about = runs[1] / "adapter" / "dist_peft.json"
    before = about.read_text()
    other = json.loads(before)
    name = "model.layers.1.mlp.up_proj.weight"
    other["base_content"]["tensors"][name] = "2:" + "0" * 16
    about.write_text(json.dumps(other))
    assert combine(*runs, "--out", tmp_path / "out") == 2
    assert f"tensors hold other values, such as {name}" in capsys.readouterr().err
    other["base_content"]["config"]["hidden_act"] = "relu"
    about.write_text(json.dumps(other))
    assert combine(*runs, "--out", tmp_path / "out") == 2
    assert 'in config.json hidden_act is "relu", was "silu"' in capsys.readouterr().err
    del other["base_content"]  # an adapter of an earlier version
    about.write_text(json.dumps({**other, "base_fingerprint": "v2:" + "0" * 64}))
    assert combine(*runs, "--out", tmp_path / "out") == 2
    assert "were trained on different bases" in capsys.readouterr().err
    about.write_text(before)
