"""Signals are noted and handlers restored (whole runs: ``test_training_run``)."""

import os
import signal

import pytest

from dist_peft.app.stop_signals import catch_stop_signals

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_asks_for_a_stop(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in SIGNALS]
    with catch_stop_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
    assert [signal.getsignal(n) for n in SIGNALS] == before
    with catch_stop_signals() as again:
        assert not again()


def interrupt_twice() -> None:
    with catch_stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        os.kill(os.getpid(), signal.SIGINT)


def test_second_interrupt_stops_at_once() -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupt_twice()
