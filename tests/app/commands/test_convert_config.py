"""``dist-peft convert-config``: output, listing, and refusals that write nothing."""

from pathlib import Path

import pytest

from dist_peft.app.cli import main
from dist_peft.core.config.io import load_config

LEAST = "base_model: m\ndatasets: [{path: a.jsonl}]\nlearning_rate: 1e-4\nadapter: lora\n"


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    (tmp_path / "theirs.yml").write_text(LEAST + "tokens: [a]\nstrict: true\nmicro_batch_size: 3\n")
    return tmp_path / "theirs.yml"


def test_printed_and_written(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert-config", str(theirs), "--ranks", "2"]) == 0
    printed, listed = capsys.readouterr()
    assert listed.splitlines() == [
        "without a counterpart: tokens: ['a'] -- no key here: the vocabulary is that of the base's "
        "tokenizer",
        "not needed here: strict",
    ]
    out = tmp_path / "ours.yaml"
    assert main(["convert-config", str(theirs), "--ranks", "2", "--out", str(out)]) == 0
    assert capsys.readouterr() == ("", listed)
    assert out.read_text() == printed
    assert load_config(out).train.global_batch == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ranks", "0"], "--ranks 0: give a number of 1 or more"),
        (["--out", "theirs.yml"], "--out theirs.yml exists; choose another file"),
        (["--out", "nowhere/ours.yaml"], "--out nowhere/ours.yaml cannot be written"),
    ],
)
def test_refusals(
    theirs: Path,
    options: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(theirs.parent)
    before = theirs.read_text()
    assert main(["convert-config", "theirs.yml", *options]) == 2
    out, err = capsys.readouterr()
    assert words in err and out == "" and len(err.splitlines()) == 1
    assert [file.name for file in theirs.parent.iterdir()] == ["theirs.yml"]
    assert theirs.read_text() == before
