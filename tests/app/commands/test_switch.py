"""Options of ``dist-peft switch``; ``tests/app/test_task_switching.py`` runs it."""

from pathlib import Path

import pytest

from dist_peft.app import cli


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--from", "none", "--to", "none"], "there is nothing to switch"),
        (["--from", "runs/a", "--to", "none"], "runs/a is no run directory"),
        (["--from", "none", "--to", "runs/b", "--max-error", "0.1"], "runs/b is no run directory"),
    ],
)
def test_wrong_options(
    argv: list[str], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    merged, out = tmp_path / "merged", tmp_path / "out"
    merged.mkdir()
    assert cli.main(["switch", "--merged", str(merged), *argv, "--out", str(out)]) == 2
    assert words in capfd.readouterr().err
    assert not out.exists()


def test_both_runs_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["switch", "--merged", "m", "--to", "none", "--out", "o"])
    assert error.value.code == 2
    assert "--from" in capsys.readouterr().err
