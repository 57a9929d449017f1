"""Errors become exit codes and one message."""

import argparse
from collections.abc import Callable

import pytest

from dist_peft.app.exit_codes import run_command
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.export.verdict import VerificationError


def _raise(error: BaseException) -> Callable[[argparse.Namespace, World], int]:
    def run(args: argparse.Namespace, world: World) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("data.train is empty"), 2, "dist-peft: data.train is empty\n"),
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


def test_any_other_error_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(verb="train", run=_raise(ZeroDivisionError("steps")))
    assert run_command(args) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text and "ZeroDivisionError: steps" in text


def test_the_command_that_ranks_compare_names_given_options_only() -> None:
    seen = []

    def run(args: argparse.Namespace, world: World) -> int:
        seen.append(world.command)
        return 75

    args = argparse.Namespace(
        verb="eval", run=run, config="a.yaml", overrides=[], local_rank=1, run_dir="r", trust=False
    )
    assert run_command(args) == 75
    assert seen == ["eval --run_dir=r"]
