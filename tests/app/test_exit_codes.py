"""Errors become exit codes and one message."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_peft.app.exit_codes import _report_failure, run_command
from dist_peft.core.errors import RunFailure, UserError
from dist_peft.core.log import close_log, setup_log
from dist_peft.core.stop_signals import StopRequested
from dist_peft.core.world import World
from dist_peft.export.verdict import VerificationError
from dist_peft.train.run_state import read_run_state, set_run_state


def _raise(error: BaseException) -> Callable[[argparse.Namespace, World], int]:
    def run(args: argparse.Namespace, world: World) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("data.train is empty"), 2, "dist-peft: data.train is empty\n"),
        (RunFailure("step 7: not finite"), 1, "dist-peft: step 7: not finite\n"),
        (VerificationError("28 % off"), 1, "dist-peft: 28 % off\n"),
        (KeyboardInterrupt(), 130, "dist-peft: interrupted\n"),
    ],
)
def test_an_expected_error_is_one_message(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = argparse.Namespace(verb="train", run=_raise(error))
    assert run_command(args) == code
    assert capsys.readouterr().err == message


def _return_75(args: argparse.Namespace, world: World) -> int:
    return 75


@pytest.mark.parametrize(
    ("run", "code"),
    [(_raise(StopRequested()), 75), (_return_75, 75), (_raise(RunFailure("step 7")), 1)],
)
def test_a_stopped_command_creates_the_file_of_its_job_script(
    run: Callable[[argparse.Namespace, World], int],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "stopped"
    monkeypatch.setenv("DIST_PEFT_STOP_FILE", str(file))
    assert run_command(argparse.Namespace(verb="train", run=run)) == code
    assert file.exists() is (code == 75)
    monkeypatch.setenv("DIST_PEFT_STOP_FILE", str(tmp_path / "absent" / "stopped"))
    assert run_command(argparse.Namespace(verb="train", run=run)) == code


def test_a_failure_without_run_directory_prints_its_traceback_and_a_last_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = argparse.Namespace(verb="train", run=_raise(ZeroDivisionError("steps\nmore")))
    assert run_command(args) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert text.endswith("\ndist-peft: failed: ZeroDivisionError: steps\n")


def test_a_lost_peer_is_one_line_before_there_is_a_run_directory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "rank 1 on a lost its peers: no sign of life from rank 0 on b"
    monkeypatch.setattr(World, "explain_failure", lambda self, error: line)
    args = argparse.Namespace(verb="train", run=_raise(RuntimeError("gloo\nframe #0: recvBytes")))
    assert run_command(args) == 1
    assert capsys.readouterr().err == f"dist-peft: {line}\n"


def test_the_end_of_a_run_is_one_line_on_stderr_and_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail_in_a_run(args: argparse.Namespace, world: World) -> int:
        setup_log(tmp_path, 0, 1)
        set_run_state(tmp_path, "running")
        raise args.error

    traceback = f"(traceback: {tmp_path}/log.rank-0.txt)"
    for error, line in (
        (UserError("disk full"), "disk full"),
        (RuntimeError("gloo"), f"failed: RuntimeError: gloo {traceback}"),
    ):
        run_command(argparse.Namespace(verb="train", run=fail_in_a_run, error=error))
        close_log()
        assert capsys.readouterr().err == f"dist-peft: {line}\n"
        assert (tmp_path / "log.txt").read_text().endswith(f" ERROR {line}\n")
    text = (tmp_path / "log.rank-0.txt").read_text()
    assert "Traceback" in text and "raise args.error" in text and "disk full" not in text
    state = read_run_state(tmp_path)
    assert state is not None and state.state == "failed"
    assert state.reason.startswith("failed: RuntimeError: gloo")


def test_a_survivor_of_rank_0_writes_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    survivor = World(rank=1, size=2)
    setup_log(tmp_path, 1, 2)
    for silent, written in (("rank 0 (vm)", True), ("rank 10 (vm)", False), (None, False)):
        told = (
            None
            if silent is None
            else f"rank 1 on vm lost its peers: no sign of life from {silent}"
        )
        monkeypatch.setattr(World, "explain_failure", lambda *_, told=told: told)
        _report_failure(RuntimeError("closed"), survivor)
        assert capsys.readouterr().err.startswith(f"dist-peft: {told or 'rank 1 on'}")
        assert (tmp_path / "log.txt").is_file() == written
        (tmp_path / "log.txt").unlink(missing_ok=True)
    close_log()


def test_the_command_that_ranks_compare_names_given_options_only() -> None:
    seen = []

    def run(args: argparse.Namespace, world: World) -> int:
        seen.append(world.command)
        return 75

    args = argparse.Namespace(
        verb="eval", run=run, config="a.yaml", overrides=[], local_rank=1, run_dir="r", trust=False
    )
    args.verbosity = "quiet"
    assert run_command(args) == 75
    assert seen == ["eval --run_dir=r"]
