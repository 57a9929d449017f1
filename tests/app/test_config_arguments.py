"""``--config`` and overrides, as launchers pass them."""

import argparse
from pathlib import Path

import pytest

from dist_peft.app.config_arguments import add_config_arguments, parse_path


def test_config_overrides_and_a_launcher_argument() -> None:
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    args = parser.parse_args(["--local_rank=1", "--config", "c.yaml", "train.lr=1e-3", "seed=2"])
    assert args.config == Path("c.yaml") and args.local_rank == 1
    assert args.overrides == ["train.lr=1e-3", "seed=2"]


@pytest.mark.parametrize("text", ["", "a\0b", "x" * 300])
def test_text_that_is_no_path(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="path"):
        parse_path(text)
    assert parse_path("a/b") == Path("a/b")
