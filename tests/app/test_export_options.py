"""Arguments of ``merge`` and ``export``."""

import argparse
import logging

import pytest

from dist_peft.app.export_options import (
    add_export_arguments,
    add_merge_arguments,
    add_run_arguments,
    parse_verification_options,
    warn_unused_arguments,
)
from dist_peft.app.verified_export import VerificationOptions


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_export_arguments(parser)
    add_run_arguments(parser)
    return parser.parse_args(["--run", "run", "--out", "out", *argv])


def test_defaults() -> None:
    args = parse("--format", "mlx")
    assert (args.max_error, args.verify_minutes, args.bits) == (None, 10.0, None)
    assert parse_verification_options(args) == VerificationOptions(None, 600.0, "auto")
    parser = argparse.ArgumentParser()
    add_merge_arguments(parser)
    assert parser.parse_args([]).dtype == "bfloat16"


@pytest.mark.parametrize(
    "argv",
    [
        ["--max-error", "-0.1"],
        ["--max-error", "inf"],
        ["--max-error", "nan"],
        ["--max-error", "5%"],
        ["--verify-minutes", "0"],
        ["--verify-minutes", "nan"],
    ],
)
def test_values_out_of_range(argv: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse("--format", "mlx", *argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--format", "gguf", "--bits", "4"], "--bits has no effect on format gguf"),
        (["--format", "gptq", "--lossy"], "--lossy has no effect without --merge"),
        (["--format", "peft", "--base", "decoded"], "--base has no effect where nothing is merged"),
        (["--format", "mlx", "--bits", "4"], ""),
    ],
)
def test_options_without_effect(
    argv: list[str], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    warn_unused_arguments(parse(*argv))
    assert words in caplog.text and bool(caplog.text) == bool(words)


def test_options_of_a_comparison_that_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    args = parse("--format", "mlx", "--no-verify", "--verify", "blocks", "--max-error", "1")
    assert parse_verification_options(args) is None
    assert "--max-error has no effect with --no-verify" in caplog.text
    assert "--verify has no effect with --no-verify" in caplog.text
