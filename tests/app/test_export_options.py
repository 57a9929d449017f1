"""Arguments of ``merge`` and ``export``."""

import argparse
import logging

import pytest

from dist_peft.app.export_options import (
    add_export_arguments,
    add_merge_arguments,
    add_run_arguments,
    warn_unused_arguments,
)


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_export_arguments(parser)
    add_run_arguments(parser)
    return parser.parse_args(["--run", "run", "--out", "out", *argv])


def test_defaults() -> None:
    args = parse("--format", "mlx")
    assert (args.max_error, args.verify_minutes, args.bits) == (None, 10.0, None)
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
