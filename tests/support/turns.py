"""Cells of a large cross product take turns, so that each run of ``.ci/run`` has a part of them.

A cell that is marked ``turn(number, of)`` runs in turn ``number`` and each ``of``-th after it. The
environment variable ``DIST_PEFT_TURN`` says which turn it is: ``.ci/run`` takes it from the commit,
and without it, or with ``all``, nothing is left out.

Turns are for products whose factors, and pairs of factors where that can be, run in every turn:
``number_turn`` deals triples out in this way. What a cell alone shows is no such cell.

``tests/conftest.py`` calls ``keep_present_turn``.
"""

import os
from collections.abc import Hashable, Sequence
from typing import Any

import pytest

__all__ = [
    "VARIABLE",
    "keep_present_turn",
    "list_selected",
    "number_turn",
    "pytest_report_header",
    "read_turn",
]

VARIABLE = "DIST_PEFT_TURN"
MARK = "turn"


def read_turn() -> int | None:
    """Return the turn that the environment asks for; None: all of them."""
    text = os.environ.get(VARIABLE, "all")
    if text == "all":
        return None
    if not text.isdecimal():
        raise pytest.UsageError(f"{VARIABLE} is {text!r}: a number, or all")
    return int(text)


def number_turn(*factors: tuple[Hashable, Sequence[Any]], of: int) -> pytest.MarkDecorator:
    """Return the mark of the cell that has these values, each given with all values of its factor.

    The places of the values are added up. Of three factors with ``of`` values each, every turn thus
    has all pairs of values of any two: a Latin square.
    """
    return pytest.mark.turn(sum(values.index(value) for value, values in factors) % of, of)


def list_selected(session: pytest.Session, test: Any) -> list[dict[str, Any]]:
    """Return the parameters of the cells of ``test`` that this session runs, for a fixture that
    makes what they look at."""
    functions = [item for item in session.items if isinstance(item, pytest.Function)]
    return [item.callspec.params for item in functions if item.function is test]


def keep_present_turn(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Remove the collected tests whose turn it is not, as ``-k`` does."""
    turn = read_turn()
    if turn is None:
        return
    kept: list[pytest.Item] = []
    waiting: list[pytest.Item] = []
    for item in items:
        mark = item.get_closest_marker(MARK)
        comes = mark is None or turn % mark.args[1] == mark.args[0]
        (kept if comes else waiting).append(item)
    if waiting:
        config.hook.pytest_deselected(items=waiting)
        items[:] = kept


def pytest_report_header() -> str:
    turn = read_turn()
    if turn is None:
        return "every turn of the tests that take turns"
    return f"turn {turn} of the tests that take turns; {VARIABLE}=all: every turn"
