"""The bar on a terminal, lines elsewhere, silence on other ranks."""

import io
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dist_peft.core.log import close_log, set_verbosity, setup_log
from dist_peft.train.progress import ProgressDisplay
from dist_peft.train.step_metrics import StepMetrics


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    set_verbosity("normal")
    close_log()


def record(step: int) -> StepMetrics:
    return StepMetrics(step, 1.83417, 1.96e-4, 0.4123, 1000, 5403.4, int(7.57 * 2**30), 0)


def run(steps: range, rank: int = 0, **options: int) -> None:
    with ProgressDisplay(steps[-1], rank, first_step=steps[0] - 1, **options) as progress:
        for step in steps:
            progress.show_step(record(step))


def test_a_line_holds_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    setup_log(None, 0, 1)
    seconds = iter([0.0, 300.0])
    with ProgressDisplay(1000, 0, first_step=20, clock=lambda: next(seconds)) as progress:
        progress.show_step(record(120))  # 100 steps in 300 s, 880 to go
    assert capsys.readouterr().err == (
        "step 120/1000  loss 1.8342  lr 1.96e-04  grad 0.412  5403 tok/s  7.57 GiB  eta 0:44:00\n"
    )


def test_lines_come_every_n_steps_with_the_first_and_the_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    setup_log(None, 0, 1)
    run(range(1, 24), every=10)
    shown = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["1/23", "10/23", "20/23", "23/23"]
    run(range(12, 24), every=10)  # resumed after step 11
    shown = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["12/23", "20/23", "23/23"]


def test_a_quiet_run_has_neither_bar_nor_lines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    set_verbosity("quiet")
    setup_log(tmp_path, 0, 1)
    run(range(1, 4))
    assert terminal.getvalue() == ""
    assert (tmp_path / "log.txt").read_text().count("step ") == 3


def test_an_evaluation_is_always_shown(capsys: pytest.CaptureFixture[str]) -> None:
    setup_log(None, 0, 1)
    with ProgressDisplay(100, 0, every=50) as progress:
        progress.show_step(replace(record(7), eval_loss=1.5))
    assert "step 7/100  loss 1.8342  eval loss 1.5000  lr" in capsys.readouterr().err


def test_a_classifier_counts_rows(capsys: pytest.CaptureFixture[str]) -> None:
    """Its loss has one target a row, and the speed is not one of tokens."""
    setup_log(None, 0, 1)
    with ProgressDisplay(100, 0, unit="rows") as progress:
        progress.show_step(record(1))
    assert "  5403 rows/s  " in capsys.readouterr().err


def test_other_ranks_are_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup_log(None, 1, 2)
    run(range(1, 4), rank=1)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run(range(1, 4), rank=1)
    assert terminal.getvalue() == ""


def test_bar_on_a_terminal_and_lines_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    setup_log(tmp_path, 0, 1)
    with ProgressDisplay(13, 0, first_step=10) as progress:
        for step in (11, 12):
            progress.show_step(record(step))
        progress.show_step(replace(record(13), eval_loss=1.5))
    shown = terminal.getvalue()
    assert "13/13" in shown
    assert "loss 1.8342, lr 1.96e-04, 5403 tok/s" in shown
    assert "step 12/13" not in shown  # the bar says it already
    assert "step 13/13  loss 1.8342  eval loss 1.5000" in shown
    assert (tmp_path / "log.txt").read_text().count("INFO step") == 3


def test_a_failure_leaves_the_bar_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = ProgressDisplay(5, 0)
    with pytest.raises(RuntimeError, match="boom"), progress:
        raise RuntimeError("boom")
    assert progress._bar is None
