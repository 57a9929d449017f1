"""``dist-peft export``: what of the command line reaches the format."""

from pathlib import Path
from unittest import mock

import pytest

from dist_peft.app import cli, python_api
from dist_peft.app.commands import export
from dist_peft.core.errors import UserError
from dist_peft.core.world import World


def _run_export(*words: str) -> mock.Mock:
    argv = ["export", "--run", "r", "--out", "o", "--no-verify", *words]
    args = cli.build_verb_parser(argv).parse_args(argv)
    with mock.patch.object(python_api, "export_finished_run") as called:
        assert export.run(args, World()) == 0
    return called


@pytest.mark.parametrize("name", ["hf-bf16", "peft", "gptq"])
def test_every_format_takes_the_same_way(name: str) -> None:
    called = _run_export("--format", name, "--base", "decoded")
    assert called.call_args.args == (Path("r"), name, Path("o"), {})
    assert called.call_args.kwargs == {
        "into": "decoded",
        "verify": None,
        "trust_remote_code": False,
        "overwrite": False,
    }


def test_a_format_gets_its_own_options() -> None:
    called = _run_export("--format", "gptq", "--bits", "3", "--merge", "--type", "f16")
    assert called.call_args.args[3] == {"bits": 3, "merge": True}
    assert called.call_args.kwargs["into"] == "original"


def test_several_processes_are_refused() -> None:
    argv = ["export", "--run", "r", "--out", "o", "--format", "peft"]
    with pytest.raises(UserError, match="runs in one process, not 2"):
        export.run(cli.build_verb_parser(argv).parse_args(argv), World(rank=0, size=2))
