import pytest

from dist_peft.core.closing import ClosedAtExit


class Door(ClosedAtExit):
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def test_the_object_is_closed_once_after_an_error_too() -> None:
    with Door() as door:
        assert isinstance(door, Door) and door.closed == 0
    assert door.closed == 1
    with pytest.raises(ZeroDivisionError), Door() as door:
        raise ZeroDivisionError
    assert door.closed == 1
