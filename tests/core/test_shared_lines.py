"""Lines of the first rank, on all."""

import time
from collections.abc import Iterator

import pytest

from dist_peft.core.shared_lines import share_lines
from dist_peft.core.world import World
from tests.support.dist import run_ranks


def read_slowly() -> Iterator[str]:
    yield "one"
    time.sleep(0.7)  # longer than ranks wait between two exchanges
    yield "zwei ü"


def fail() -> Iterator[str]:
    yield "one"
    raise OSError("the terminal is gone")


def collect(world: World) -> tuple[list[str], str]:
    lines, message = list(share_lines(world, read_slowly)), ""
    try:
        list(share_lines(world, fail))
    except Exception as error:
        message = str(error)
    return lines, message


def test_alone() -> None:
    assert list(share_lines(World(), read_slowly)) == ["one", "zwei ü"]


@pytest.mark.dist
def test_every_rank_gets_the_lines_and_the_error_of_the_first() -> None:
    found = run_ranks(collect, 2)
    assert [lines for lines, _ in found] == [["one", "zwei ü"]] * 2
    assert all("the terminal is gone" in message for _, message in found)
