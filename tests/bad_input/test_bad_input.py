"""The table of bad inputs: each is refused with exit code 2 and one message, and nothing is left.

A message says what is wrong, by the name of the key, file or option, and what to do. The command
runs as a user runs it, in forked processes.
"""

import shutil
from pathlib import Path

import pytest

from tests.bad_input import (
    rows_base,
    rows_config,
    rows_data,
    rows_launch,
    rows_runs,
    rows_sweep,
)
from tests.bad_input.case import COMMANDS, Row
from tests.bad_input.checks import check_row, check_unchanged, find_message, list_contents
from tests.support.forked_commands import Ended, run_forked

pytestmark = pytest.mark.e2e

TABLE = [
    *rows_config.ROWS,
    *rows_base.ROWS,
    *rows_data.ROWS,
    *rows_runs.ROWS,
    *rows_launch.ROWS,
    *rows_sweep.ROWS,
]
MOST_OTHERS = 6
"""Messages of other rows that the words of a row may fit."""

messages: dict[str, str] = {}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=pytest.mark.turn(number % 3, 3), id=row.name)
        for number, row in enumerate(TABLE)
    ],
)
def test_is_refused(row: Row, workspace: Path, place: Path) -> None:
    messages[row.name] = check_row(row, workspace, place)


@pytest.mark.parametrize("command", sorted({row.command for row in TABLE}))
def test_undamaged_input_is_accepted(command: str, workspace: Path, place: Path) -> None:
    """Else a row could be refused for another reason than its own."""
    shutil.copytree(workspace, place)
    (ended,) = run_forked(COMMANDS[command], place)
    assert ended.code == 0, ended.stderr


BEFORE_TRAINING = [
    row
    for row in rows_data.ROWS
    if row.command in ("train", "chat", "classify") and not row.name.startswith("pseudo")
]
OF = 4


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=pytest.mark.turn(number % OF, OF), id=row.name)
        for number, row in enumerate(BEFORE_TRAINING)
    ],
)
def test_validate_refuses_it_too(row: Row, workspace: Path, place: Path) -> None:
    """Bad data is found before training starts, by the same words."""
    words = ("validate", *row.arguments[1:], "--no-plan", "--rows", "0")
    shutil.copytree(workspace, place, symlinks=True)
    if row.damage is not None:
        row.damage(place)
    before = list_contents(place)
    (ended,) = run_forked(words, place, env=row.env)
    message = find_message(ended)
    assert ended.code == 2 and message is not None, ended.stderr
    missing = [word for word in row.words if word.lower() not in message.lower()]
    assert not missing, message
    check_unchanged(before, list_contents(place), [message])


def test_size_of_the_table() -> None:
    assert len(TABLE) >= 150
    assert len({row.name for row in TABLE}) == len(TABLE)
    assert sum(row.ranks > 1 for row in TABLE) >= 12


def test_words_are_specific() -> None:
    """The words of a row fit its own message, and few others."""
    faults = {}
    for row in TABLE:
        if sum(map(len, row.words)) < 6:
            faults[row.name] = f"{row.words} are too short"
        fitting = [
            other.name
            for other in TABLE
            if set(other.words) != set(row.words)
            and all(w.lower() in messages.get(other.name, "").lower() for w in row.words)
        ]
        if len(fitting) > MOST_OTHERS:
            faults[row.name] = f"{row.words} fit {fitting}"
    assert not faults


# -- the checks ------------------------------------------------------------------------------------


def test_message_is_the_only_and_last_one() -> None:
    good = Ended(2, "", "step 1\nwarning: slow\ndist-peft: key a is wrong; set b\n")
    assert find_message(good) == "dist-peft: key a is wrong; set b"
    usage = Ended(2, "", "usage: dist-peft merge ...\ndist-peft merge: error: argument --out: x\n")
    assert find_message(usage) == "dist-peft merge: error: argument --out: x"
    assert find_message(Ended(2, "", "warning: nothing else\n")) is None
    for text in (
        "Traceback (most recent call last):\ndist-peft: x\n",
        "dist-peft: x\ndist-peft: y\n",
        "dist-peft: x\n" + "more\n" * 9,
        "dist-peft: " + "x" * 3000,
    ):
        with pytest.raises(AssertionError):
            find_message(Ended(2, "", text))


LOG = {"run/log.txt": b"old\n"}


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ({"a": b"1"}, {}, "lost"),
        ({"a": b"1"}, {"a": b"2"}, "a was changed"),
        ({}, {"out/.model.tmp": b""}, "was left"),
        ({}, {"new": b"(directory)"}, "new was left"),
        ({}, {"cache/tokens/x.tmp-1": b""}, "was left"),
        (LOG, {"run/log.txt": b"new\n"}, "rewritten"),
        (LOG, {"run/log.txt": b"old\ndate ERROR other\n"}, "ERROR other"),
        (LOG, {**LOG, "run/run_state.json": b'{"state": "running"}'}, "running"),
    ],
)
def test_what_is_left_is_found(
    before: dict[str, bytes], after: dict[str, bytes], fault: str
) -> None:
    with pytest.raises(AssertionError, match=fault):
        check_unchanged(before, after, ["dist-peft: it is wrong"])


def test_log_of_a_run_that_had_begun() -> None:
    after = {
        "new": b"(directory)",
        "new/log.txt": b"date INFO x\ndate ERROR it is wrong\n",
        "new/run_state.json": b'{"state": "refused"}',
        f"cache/tokens/{'0' * 32}": b"(directory)",
        f"cache/tokens/{'0' * 32}/meta.json": b"{}",
    }
    check_unchanged({}, after, ["dist-peft: it is wrong"])
