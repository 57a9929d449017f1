"""``dist-peft export``: which of the three ways a format takes."""

from pathlib import Path
from unittest import mock

import pytest

from dist_peft.app import cli
from dist_peft.app.commands import export
from dist_peft.core.errors import UserError
from dist_peft.core.world import World


def _run_export(*words: str) -> dict[str, mock.Mock]:
    argv = ["export", "--run", "r", "--out", "o", "--no-verify", *words]
    args = cli.build_verb_parser(argv).parse_args(argv)
    names = ("merge_finished_run", "export_adapter", "export_finished_run", "load_finished_run")
    with mock.patch.multiple(export, **dict.fromkeys(names, mock.DEFAULT)) as called:
        assert export.run(args, World()) == 0
    return {name: call for name, call in called.items() if call.called}


def test_hf_bf16_is_a_merge() -> None:
    called = _run_export("--format", "hf-bf16", "--base", "decoded")
    assert (
        set(called) == {"merge_finished_run"}
        and called["merge_finished_run"].call_args.kwargs["into"] == "decoded"
    )


def test_an_adapter_format_reads_the_run_and_writes_the_adapter() -> None:
    called = _run_export("--format", "peft")
    assert set(called) == {"load_finished_run", "export_adapter"}
    assert called["export_adapter"].call_args.args[1:] == (Path("r"), "peft", Path("o"))


def test_a_quantized_format_gets_its_options() -> None:
    called = _run_export("--format", "gptq", "--bits", "3", "--merge")
    run_dir, name, out, options = called["export_finished_run"].call_args.args
    assert (run_dir, name, out) == (Path("r"), "gptq", Path("o"))
    assert (options["bits"], options["merge"], options["keep_adapter"]) == (3, True, False)


def test_several_processes_are_refused() -> None:
    argv = ["export", "--run", "r", "--out", "o", "--format", "peft"]
    with pytest.raises(UserError, match="runs in one process, not 2"):
        export.run(cli.build_verb_parser(argv).parse_args(argv), World(rank=0, size=2))
