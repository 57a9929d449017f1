"""``run.json``: what is accepted, what is refused by name."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dist_peft.core.errors import UserError
from dist_peft.train.run_position import RunPosition, read_position

GOOD = asdict(RunPosition(3, 12, 0, "base", {"adapter.r": 4}))


def saved(tmp_path: Path, content: str, name: str = "step-000003") -> Path:
    path = tmp_path / name
    path.mkdir(exist_ok=True)
    (path / "run.json").write_text(content)
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert vars(read_position(saved(tmp_path, json.dumps(GOOD)))) == GOOD
    assert read_position(saved(tmp_path, json.dumps(GOOD), "best")).step == 3


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "[" * 100_000,
        json.dumps({"step": 1}),
        *(json.dumps({**GOOD, **c}) for c in ({"step": "x"}, {"step": True}, {"values": []})),
        json.dumps({**GOOD, "step": -1}),
        json.dumps({**GOOD, "other": 1}),
        json.dumps({**GOOD, "nonfinite_steps": [0]}),
        json.dumps({**GOOD, "nonfinite_steps": ["1"]}),
        json.dumps({**GOOD, "lr_halvings": -1}),
    ],
    ids=[
        *("cut", "list", "deep", "missing", "text", "truth", "values", "negative", "unknown"),
        *("step 0", "step text", "halvings"),
    ],
)
def test_unreadable_position_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(UserError, match=r"step-000003 has an unreadable run\.json"):
        read_position(saved(tmp_path, content))


@pytest.mark.parametrize("number", [0, 5])
def test_other_format_is_refused(tmp_path: Path, number: int) -> None:
    with pytest.raises(UserError, match=f"has format {number}, this version reads up to 4"):
        read_position(saved(tmp_path, json.dumps({**GOOD, "format": number})))


def test_step_of_another_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step-000020 has a run\.json of step 3"):
        read_position(saved(tmp_path, json.dumps(GOOD), "step-000020"))


def test_third_format_has_no_failed_steps(tmp_path: Path) -> None:
    new = ("nonfinite_steps", "lr_halvings")
    old = {k: v for k, v in GOOD.items() if k not in new} | {"format": 3}
    position = read_position(saved(tmp_path, json.dumps(old)))
    assert (position.nonfinite_steps, position.lr_halvings) == ([], 0)


def test_first_format_is_read_without_values(tmp_path: Path) -> None:
    """Its digests say nothing by key; ``eval`` needs the step and the base alone."""
    old: dict[str, Any] = {k: v for k, v in GOOD.items() if k != "values"}
    old |= {"format": 1, "adapter": "a", "data": "d"}
    found = read_position(saved(tmp_path, json.dumps(old)))
    assert (found.step, found.base, found.values, found.format) == (3, "base", {}, 1)
