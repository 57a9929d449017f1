"""Signals are noted from the first line on (whole runs: ``test_training_run``)."""

import signal
from collections.abc import Iterator

import pytest

from dist_peft.core.stop_signals import (
    STOP_SIGNALS,
    StopRequested,
    catch_stop_signals,
    get_interrupt_exit_code,
    interrupt_on_stop_signals,
    is_stop_requested,
    raise_if_stop_requested,
    request_stop,
)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_asks_for_a_stop(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in STOP_SIGNALS]
    with catch_stop_signals() as stop:
        assert not stop()
        raise_if_stop_requested()
        signal.raise_signal(number)
        assert stop()
        with pytest.raises(StopRequested, match=f"stopped on {number.name}"):
            raise_if_stop_requested()
    assert [signal.getsignal(n) for n in STOP_SIGNALS] == before
    with catch_stop_signals() as again:
        assert not again()


def test_inner_command_sees_what_the_outer_noted() -> None:
    """An entry point notes signals before the command that answers them is imported."""
    with catch_stop_signals():
        signal.raise_signal(signal.SIGUSR1)
        with catch_stop_signals() as stop:
            assert stop()
        assert is_stop_requested()
    assert not is_stop_requested()


def test_hangup_stays_ignored_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catch_stop_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def interrupt_twice() -> None:
    with catch_stop_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop()
        signal.raise_signal(signal.SIGINT)


def test_second_interrupt_stops_at_once() -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupt_twice()


def be_interrupted(number: signal.Signals, early: bool) -> Iterator[int]:
    with catch_stop_signals():
        try:
            if early:
                signal.raise_signal(number)
            interrupt_on_stop_signals()
            signal.raise_signal(number)
        except KeyboardInterrupt:
            yield get_interrupt_exit_code()


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_command_without_safe_points_ends_at_once(number: signal.Signals, early: bool) -> None:
    assert list(be_interrupted(number, early)) == [128 + number]


def test_request_of_another_rank_counts() -> None:
    with catch_stop_signals() as stop:
        request_stop("SIGUSR1 on another rank")
        assert stop()
        with pytest.raises(StopRequested, match="SIGUSR1 on another rank"):
            raise_if_stop_requested()
