"""Cells take turns: each turn has every pair of values, and all turns together every cell."""

from itertools import chain, combinations, product

import pytest

from tests.support import turns
from tests.support.turns import (
    ALTERNATE_FILES,
    PROCESS_MARKS,
    TURNS_OF_CELLS,
    VARIABLE,
    number_turn,
    read_turn,
)

pytest_plugins = ["pytester"]

FACTORS = [["a", "b", "c", "d"], ["x", "y", "z"], [1, 2, 3]]
CELLS = list(product(*FACTORS))

CONFTEST = """
from tests.support.turns import keep_present_turn, pytest_report_header

def pytest_collection_modifyitems(config, items):
    keep_present_turn(config, items)

def pytest_configure(config):
    config.addinivalue_line("markers", "turn(number, of): takes turns")
"""
TESTS = """
import pytest
from tests.support.turns import list_selected

@pytest.fixture(scope="module")
def cells(request):
    return [values["cell"] for values in list_selected(request.session, test_cell)]

CELLS = [pytest.param(n, marks=pytest.mark.turn(n % 3, 3)) for n in range(7)]

@pytest.mark.parametrize("cell", CELLS)
def test_cell(cells, cell): assert cell in cells and len({n % 3 for n in cells}) == EXPECTED

def test_always(): pass
"""


def list_cells_of_turn(turn: int) -> list[tuple[object, ...]]:
    def comes(cell: tuple[object, ...]) -> bool:
        mark = number_turn(*zip(cell, FACTORS, strict=True), of=3).mark
        assert mark.name == "turn" and mark.args[1] == 3
        return bool(mark.args[0] == turn)

    return [cell for cell in CELLS if comes(cell)]


def test_every_turn_has_every_pair() -> None:
    for turn, (i, j) in product(range(3), combinations(range(3), 2)):
        pairs = {(cell[i], cell[j]) for cell in list_cells_of_turn(turn)}
        assert pairs == set(product(FACTORS[i], FACTORS[j]))


def test_all_turns_have_every_cell_once() -> None:
    turns = [list_cells_of_turn(turn) for turn in range(3)]
    assert sorted(map(str, chain(*turns))) == sorted(map(str, CELLS))
    assert max(map(len, turns)) == len(CELLS) // 3


@pytest.mark.parametrize(
    ("turn", "passed", "left_out"), [("0", 4, 4), ("1", 3, 5), ("31", 3, 5), ("all", 8, 0)]
)
def test_the_other_turns_are_left_out(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    turn: str,
    passed: int,
    left_out: int,
) -> None:
    monkeypatch.setenv(VARIABLE, turn)
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS.replace("EXPECTED", "3" if turn == "all" else "1"))
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=passed, deselected=left_out)
    header = "every turn*" if turn == "all" else f"turn {turn} of the tests*"
    result.stdout.fnmatch_lines([header])


def test_without_the_variable_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert read_turn() is None
    monkeypatch.setenv(VARIABLE, "next")
    with pytest.raises(pytest.UsageError, match="'next': a number, or all"):
        read_turn()


ALTERNATE_TESTS = """
import pytest

@pytest.mark.dist
@pytest.mark.parametrize("cell", [pytest.param(n, marks=pytest.mark.turn(n, 2)) for n in (0, 1)])
def test_cell_of_processes(cell): pass

@pytest.mark.dist
def test_processes(): pass

def test_always(): pass
"""


@pytest.mark.parametrize(("digit", "expected"), [(0, 3), (1, 1), (2, 1), (3, 3)])
def test_files_take_turns_and_all_their_cells_come(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, digit: int, expected: int
) -> None:
    monkeypatch.setattr(turns, "TESTS", pytester.path)
    monkeypatch.setattr(turns, "ALTERNATE_FILES", (("test_it.py",), (), ()))
    pytester.makeconftest(CONFTEST.replace('takes turns")', 'takes turns")' + MARKS))
    pytester.makepyfile(test_it=ALTERNATE_TESTS)
    for cell in range(2):
        monkeypatch.setenv(VARIABLE, str(TURNS_OF_CELLS * digit + cell))
        result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-v")
        result.assert_outcomes(passed=expected, deselected=4 - expected)
        assert (f"test_cell_of_processes[{cell}]" in result.stdout.str()) is (expected == 3)


MARKS = """
    config.addinivalue_line("markers", "dist: processes")"""


@pytest.mark.parametrize("name", list(chain(*ALTERNATE_FILES)))
def test_alternate_files_are_there_and_start_processes(name: str) -> None:
    text = (turns.TESTS / name).read_text()
    assert any(f"pytest.mark.{mark}" in text for mark in PROCESS_MARKS)
    assert sum(name in files for files in ALTERNATE_FILES) == 1
