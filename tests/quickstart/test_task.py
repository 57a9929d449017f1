"""The quickstart's task: right cards, nothing shared between training and evaluation."""

import ast
import json
from pathlib import Path

import pytest

from dist_peft.core.errors import UserError
from dist_peft.quickstart import task as stdlib_task
from dist_peft.quickstart.corpus import read_stdlib_files
from dist_peft.quickstart.task import has_right_fields, write_stdlib_task


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.e2e
def test_cards_and_split(tmp_path: Path) -> None:
    train_file, eval_file = write_stdlib_task(tmp_path / "a")
    train, held_out = read(train_file), read(eval_file)
    assert len(train) > 1000
    assert len(held_out) > 80
    for record in [*train, *held_out]:
        signature = record["prompt"].split("\n")[1]
        function = ast.parse(signature + " pass").body[0]
        assert isinstance(function, ast.FunctionDef)
        kind, arguments, summary = record["completion"].split("\n")
        assert kind in ("kind: function", "kind: method")
        listed = arguments.removeprefix("arguments: ").split(", ")
        given = {n.arg for n in ast.walk(function) if isinstance(n, ast.arg)}
        assert set(listed) == (given or {"none"})
        assert 15 <= len(summary.removeprefix("summary: ")) <= 160
    for key in ("prompt", "completion"):
        assert not {r[key] for r in train} & {r[key] for r in held_out}


def test_same_every_time_and_other_seed_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = read_stdlib_files(max_chars=400_000)
    monkeypatch.setattr(stdlib_task, "read_stdlib_files", lambda: some)
    first, again = write_stdlib_task(tmp_path / "a")[0], write_stdlib_task(tmp_path / "b")[0]
    assert first.read_bytes() == again.read_bytes()
    assert write_stdlib_task(tmp_path / "c", seed=1)[0].read_bytes() != first.read_bytes()


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the task into"):
        write_stdlib_task(tmp_path / "file")


def test_right_fields() -> None:
    card = "kind: method\narguments: self, x\nsummary: Return x."
    assert has_right_fields(card, card)
    assert has_right_fields("\nkind: method\narguments: self, x\nsummary: Other.\n", card)
    assert not has_right_fields("kind: function\narguments: self, x\nsummary: Return x.", card)
    assert not has_right_fields("kind: method", card) and not has_right_fields("", card)
