"""One of two threads prints the last line of a command."""

import faulthandler
import threading
from collections.abc import Callable, Iterator

import pytest

from dist_peft.app import exit_codes, last_line
from dist_peft.app.last_line import claim_last_line, reset_last_line
from dist_peft.app.stall_exit import end_stalled_run
from dist_peft.core.stall_watch import StallReport
from dist_peft.core.world import World


@pytest.fixture(autouse=True)
def _no_owner() -> Iterator[None]:
    reset_last_line()
    yield
    reset_last_line()


def call_in_thread(function: Callable[[], object]) -> object:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join(20)
    return found[0]


def test_the_first_thread_has_the_line() -> None:
    assert claim_last_line() and claim_last_line()
    assert call_in_thread(claim_last_line) is False
    reset_last_line()
    assert call_in_thread(claim_last_line) is True
    assert not claim_last_line()


def test_a_stall_adds_nothing_to_a_command_that_fails_already(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert claim_last_line()
    report = StallReport("stands still", False, lambda: pytest.fail("it continued"))
    try:
        call_in_thread(lambda: end_stalled_run(World(), report))  # else it ends this process
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert capfd.readouterr() == ("", "")


def test_a_failure_adds_nothing_to_a_stall_that_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def stop() -> None:
        raise InterruptedError

    monkeypatch.setattr(exit_codes, "wait_for_exit", stop)
    call_in_thread(claim_last_line)
    with pytest.raises(InterruptedError):
        exit_codes._report_failure(ValueError("connection closed"), World())
    assert capfd.readouterr() == ("", "")
    waiting = threading.Thread(target=last_line.wait_for_exit, daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
