"""``dist-peft merge``: its options; the merge itself is tested in ``tests/app``."""

import argparse
from pathlib import Path
from unittest import mock

import pytest

from dist_peft.app import cli, python_api
from dist_peft.app.commands import merge
from dist_peft.app.verified_export import VerificationOptions
from dist_peft.core.errors import UserError
from dist_peft.core.world import World


def _parse(*words: str) -> argparse.Namespace:
    argv = ["merge", *words]
    return cli.build_verb_parser(argv).parse_args(argv)


def test_options_reach_the_merge() -> None:
    args = _parse("--run", "r", "--out", "o", "--base", "decoded", "--dtype", "float32")
    with mock.patch.object(python_api, "merge_finished_run") as called:
        assert merge.run(args, World()) == 0
    assert called.call_args.args == (Path("r"), Path("o"))
    assert called.call_args.kwargs == {
        "into": "decoded",
        "dtype": "float32",
        "keep_zeros": False,
        "verify": VerificationOptions(None, 600.0),
        "trust_remote_code": False,
        "overwrite": False,
    }


def test_no_verify_compares_nothing() -> None:
    args = _parse("--run", "r", "--out", "o", "--no-verify")
    with mock.patch.object(python_api, "merge_finished_run") as called:
        merge.run(args, World())
    assert called.call_args.kwargs["verify"] is None


def test_several_processes_are_refused() -> None:
    with pytest.raises(UserError, match="runs in one process, not 3"):
        merge.run(_parse("--run", "r", "--out", "o"), World(rank=1, size=3))
