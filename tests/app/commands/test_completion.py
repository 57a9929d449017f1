"""``dist-peft completion``: bash completes verbs and options from the printed script."""

import importlib.util
import subprocess
import sys

import pytest

from dist_peft.app.cli import main


@pytest.mark.e2e
@pytest.mark.skipif(importlib.util.find_spec("shtab") is None, reason="of the completion extra")
def test_bash_completes_verbs_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    for words, expected in (
        ("dist-peft me", "merge"),
        ("dist-peft merge --ov", "--overwrite"),
        ("dist-peft merge --dtype bf", "bfloat16"),
        ("dist-peft convert-config --ra", "--ranks"),
    ):
        given = words.split()
        ask = (
            f"{script}\nCOMP_WORDS=({words}); COMP_CWORD={len(given) - 1}\n"
            '_shtab_dist_peft; echo "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
        assert done.stdout.split() == [expected]


def test_without_shtab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "zsh"]) == 2
    assert "pip install 'dist_peft[completion]'" in capsys.readouterr().err
