"""``--json``: one document on stdout of each verb, when it succeeds, is refused, and fails."""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_peft.app import cli
from dist_peft.app.commands import eval as eval_command
from dist_peft.app.commands.train import train_from_config
from dist_peft.app.json_output import JSON_VERBS, print_document, reserve_stdout
from dist_peft.core.config.io import parse_config
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from tests.support.tiny_runs import save_config, tiny_tree

DONE: dict[str, list[str]] = {
    "validate": ["--config", "config.yaml", "--no-plan"],
    "plan": ["--config", "config.yaml", "--gpu-memory", "1MiB"],
    "eval": ["--run", "run"],
    "merge": ["--run", "run", "--out", "OUT"],
    "export": ["--run", "run", "--out", "OUT", "--format", "peft"],
    "compare": ["run", "second"],
    "inspect": ["run"],
}
"""Arguments by verb, in the directory of a finished run; the plan does not fit (exit code 3)."""

REFUSED: dict[str, tuple[list[str], str]] = {
    "validate": (["--config", "config.yaml", "train.lr=-1"], "train.lr"),
    "plan": (["--config", "config.yaml", "--gpu-memory", "much"], "no amount of memory"),
    "eval": (["--run", "none"], "none is no run directory"),
    "merge": (["--run", "none", "--out", "OUT"], "none"),
    "export": (["--run", "run", "--out", "OUT", "--format", "gptq"], "integer base"),
    "compare": (["run"], "two"),
    "inspect": (["none"], "none"),
}
"""Arguments that are refused with exit code 2, and a part of the message."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("json")
    tree = tiny_tree(root, train__steps=1)
    save_config(root, tree)
    assert train_from_config(parse_config(tree), World()) == 0
    close_log()
    shutil.copytree(root / "run", root / "second")
    return root


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    close_log()


def parse_only_document(text: str) -> Any:
    """The document in ``text``, which has nothing else and is of strict JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def run_verb(
    verb: str, words: list[str], directory: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[int, Any, str]:
    """Exit code, document and stderr of a command with ``--json``."""
    words = [str(out) if word == "OUT" else word for word in words]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        capsys.readouterr()
        try:
            code = cli.main([verb, *words, "--json"])
        except SystemExit as end:
            code = int(str(end.code))
    printed, logged = capsys.readouterr()
    assert printed.endswith("\n"), printed
    return code, parse_only_document(printed), logged


def test_tables_have_every_verb_with_the_option() -> None:
    found = []
    for verb in cli.COMMANDS:
        parser = cli.build_verb_parser([verb])
        (verbs,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        if "--json" in verbs.choices[verb]._option_string_actions:
            found.append(verb)
    assert set(found) - {"chat"} == set(JSON_VERBS) == set(DONE) == set(REFUSED)


@pytest.mark.e2e
@pytest.mark.parametrize("verb", DONE)
def test_one_document_of_a_result(
    verb: str, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, document, _ = run_verb(verb, DONE[verb], directory, tmp_path / "out", capsys)
    assert (
        code == (3 if verb == "plan" else 0)
        and isinstance(document, dict)
        and "error" not in document
    )


@pytest.mark.e2e
@pytest.mark.parametrize("verb", REFUSED)
def test_one_document_of_a_refusal(
    verb: str, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, part = REFUSED[verb]
    code, document, logged = run_verb(verb, words, directory, tmp_path / "out", capsys)
    assert code == document["exit_code"] == 2 and set(document) == {"error", "exit_code"}
    assert part in document["error"] and f"dist-peft: {document['error']}\n" in logged


@pytest.mark.parametrize("verb", JSON_VERBS)
def test_errors_of_usage(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document, logged = run_verb(verb, ["--learning-rate", "1"], tmp_path, tmp_path, capsys)
    assert code == document["exit_code"] == 2
    assert document["error"] in logged and "usage: dist-peft" in logged


@pytest.mark.e2e
def test_a_report_with_problems_is_the_only_document(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", "config.yaml", "--no-plan", "data.train=[none.jsonl]"]
    code, document, logged = run_verb("validate", words, directory, tmp_path, capsys)
    assert code == 2 and "none.jsonl" in document["problems"][0] and "none.jsonl" in logged


def test_lines_of_libraries_and_failures_are_not_in_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        print("a line of a library")
        raise ZeroDivisionError("of a bug")

    monkeypatch.setattr(eval_command, "run", fail)
    code, document, logged = run_verb("eval", ["--run", "r"], tmp_path, tmp_path, capsys)
    assert code == document["exit_code"] == 1
    assert document["error"] == "failed: ZeroDivisionError: of a bug"
    assert "a line of a library" in logged and "Traceback" in logged


def test_help_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["inspect", "--json", "--help"])
    assert "usage: dist-peft inspect" in capsys.readouterr().out


def test_numbers_that_are_not_finite_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    with reserve_stdout(["eval", "--json"]):
        print("elsewhere")
        print_document({"a": [math.nan, (1.5, -math.inf)], "b": Path("x")})
    assert sys.stdout is before
    printed, logged = capsys.readouterr()
    assert parse_only_document(printed) == {"a": [None, [1.5, None]], "b": "x"}
    assert logged == "elsewhere\n"
    print_document({"without": "--json"})
    assert parse_only_document(capsys.readouterr().out) == {"without": "--json"}
