"""The transcripts of ``docs/transcripts``: each command runs, and prints the lines that are shown.

``tests/app/commands/test_quickstart.py`` and ``tests/launch/test_slurm.py`` run those of their own.
"""

import shlex
from pathlib import Path

import pytest

from dist_peft.app import cli
from dist_peft.core.log import close_log
from tests.support.transcripts import TRANSCRIPTS, find_missing_line, read_commands, read_files


@pytest.fixture(autouse=True)
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds and lines are those of transformers; llama.cpp rounds activations to 8 bits."""
    monkeypatch.delenv("DIST_PEFT_XLLAMACPP_PYTHON", raising=False)


def test_a_line_that_is_not_printed_is_found() -> None:
    (shown,) = read_commands("```text transcript\n$ dist-peft eval\none 1\n...\nthree 3\n```")
    assert shown.command == "dist-peft eval" and not shown.has_free_numbers
    assert find_missing_line(shown, "one 1\ntwo\nthree 3\n") is None
    assert find_missing_line(shown, "one 2\ntwo\nthree 3\n") == "one 1"
    assert find_missing_line(shown, "three 3\none 1\n") == "one 1"
    assert find_missing_line(shown, "one 1\nthree 3\nfour\n") == "(after the last line) four"
    (free,) = read_commands("```text transcript numbers\n$ dist-peft eval\none 1e-3\n```")
    assert find_missing_line(free, "one 2.50\n") is None
    (size,) = read_commands("```text transcript numbers\n$ dist-peft eval\npeak 541 MiB  eta\n```")
    assert find_missing_line(size, "peak 1.83 GiB  eta\n") is None
    assert find_missing_line(size, "peak 1.83 s  eta\n") == "peak 541 MiB  eta"
    assert find_missing_line(free, "one more\n") == "one 1e-3"
    (timed,) = read_commands(
        "```text transcript numbers\n$ dist-peft inspect\nat 2026-11-29T11:38:35+00:00\n```"
    )
    assert find_missing_line(timed, "at 2027-01-02T03:04:05+01:00\n") is None
    assert find_missing_line(timed, "on 2027-01-02T03:04:05+01:00\n") is not None


@pytest.mark.data
@pytest.mark.e2e
def test_own_data_page_prints_its_lines(
    shared_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIST_PEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_COLOR", "1")
    Path("base").symlink_to(shared_data / "stories260K-hf")
    Path("questions.jsonl").symlink_to(shared_data / "gsm8k" / "train.jsonl")
    dialogues = shared_data / "llamafactory-demo" / "glaive_toolcall_en_demo.json"
    Path("dialogues.json").symlink_to(dialogues)
    page = (TRANSCRIPTS / "own_data.md").read_text()
    for name, content in read_files(page).items():
        Path(name).write_text(content)
    verbs = []
    for shown in read_commands(page):
        program, *arguments = shlex.split(shown.command)
        assert program == "dist-peft"
        code = cli.main(arguments)
        close_log()
        captured = capsys.readouterr()
        verbs.append((arguments[0], code))
        is_log = arguments[0] in ("train", "export")  # they print no result, only their log
        printed = captured.err if is_log else captured.out
        assert find_missing_line(shown, printed) is None, printed
    # the first check refuses the page's file on purpose
    assert verbs == [("validate", 2), ("validate", 0), ("train", 0), ("chat", 0), ("export", 0)]
    assert Path("served/model-q8_0.gguf").is_file()
