"""A configuration that was edited after the training is refused before anything is written."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_peft.adapters.directory import read_adapter_directory
from dist_peft.adapters.metadata import WRITTEN_CONFIG, refuse_edited_config
from dist_peft.app import cli
from dist_peft.app.commands.train import train_from_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from tests.support.tiny_runs import tiny_tree


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    close_log()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("written")
    assert train_from_config(parse_config(tiny_tree(directory)), World()) == 0
    close_log()
    return directory / "run"


def edit(run_dir: Path, key: str, value: Any) -> None:
    file = run_dir / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))


@pytest.mark.parametrize(
    "command",
    [["merge", "--no-verify"], ["export", "--format", "peft"], ["export", "--format", "gguf"]],
)
def test_edited_alpha_is_refused(
    command: list[str], trained: Path, tmp_path: Path, capsys: Any
) -> None:
    run_dir, out = shutil.copytree(trained, tmp_path / "run"), tmp_path / "out"
    edit(run_dir, "lora_alpha", 80)
    assert cli.main([*command, "--run", str(run_dir), "--out", str(out)]) == 2
    assert "says lora_alpha 80, and the adapter was trained with" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_rslora", True), ("alpha_pattern", {"q_proj": 1}), ("target_modules", ["q_proj"])],
)
def test_each_key_of_the_function_counts(
    key: str, value: Any, trained: Path, tmp_path: Path
) -> None:
    run_dir = shutil.copytree(trained, tmp_path / "run")
    edit(run_dir, key, value)
    with pytest.raises(UserError, match=f"says {key} "):
        read_adapter_directory(run_dir / "adapter")


def test_what_another_library_rewrites_does_not_count(trained: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(trained, tmp_path / "run")
    config = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())
    edit(run_dir, "target_modules", config["target_modules"][::-1])
    edit(run_dir, "base_model_name_or_path", "moved")
    edit(run_dir, "peft_version", "1")
    assert read_adapter_directory(run_dir / "adapter").tensors


def test_absent_key_and_no_copy() -> None:
    with pytest.raises(UserError, match="says r null"):
        refuse_edited_config(Path("x"), {}, {WRITTEN_CONFIG: {"r": 4}})
    refuse_edited_config(Path("x"), {"r": 5}, {})
