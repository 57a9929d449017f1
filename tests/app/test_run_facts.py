import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dist_peft.app.run_facts import (
    find_source_commit,
    list_data_rows,
    list_environment_rows,
    sample_sequences,
)
from dist_peft.core.world import World


class Sequences:
    """Sequence n has n + 1 tokens, one of them in the loss."""

    packed, seq_len, longest = True, 64, 40
    task_names, sequence_counts = ("a", "b"), [1000, 1]

    def __len__(self) -> int:
        return 1001

    def num_targets(self, index: int) -> int:
        return 1

    def get_sequence(self, index: int) -> tuple[Any, ...]:
        return (range(index + 1),)


def test_data() -> None:
    rows = cast(Any, Sequences())
    lengths, targets = sample_sequences(rows, 10)
    assert lengths == [1 + 100 * n for n in range(10)] and targets == [1] * 10
    loaders = cast(Any, SimpleNamespace(train=SimpleNamespace(rows=rows), eval=None))
    table = dict(list_data_rows(loaders))
    assert table["Training sequences"] == "1,001, packed to 64 tokens"
    assert table["By task"] == "a 1,000, b 1"
    assert table["Tokens of a sequence"] == "1 to 996, median 498 (of 200 sequences)"
    assert "Held-out sequences" not in table


def test_environment_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "abcdefgh12345")
    monkeypatch.setattr(sys, "argv", ["/x/dist_peft/__main__.py", "train", "a b", "abcdefgh12345"])
    table = dict(list_environment_rows(World(), torch.device("cpu"), "single"))
    assert table["Command"] == "python -m dist_peft train 'a b' ***"
    assert f"torch {torch.__version__}" in table["Versions"]
    assert "deepspeed" not in table["Versions"] and "cores" in table["Hardware"]


def test_commit_of_a_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        options = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *options, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert find_source_commit(tmp_path) == ""
    git("init", "-q")
    assert find_source_commit(tmp_path) == ""  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "a")
    commit = git("rev-parse", "--short=12", "HEAD")
    assert find_source_commit(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    assert find_source_commit(tmp_path) == f"{commit} with changes"
