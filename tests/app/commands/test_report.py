from pathlib import Path

import pytest

from tests.support.command_line import lines
from tests.support.compared_runs import make_run
from tests.support.curves import skip_curves


def test_draws_again_and_refuses_unfinished_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "a", 8, 2.0)
    with skip_curves():
        assert lines(["report", str(run)], capsys).strip() == str(run / "report.html")
    assert "card 8" in (run / "report.html").read_text()
    unfinished = make_run(tmp_path / "b", 8, 2.0, is_finished=False)
    assert "finish the run first" in lines(["report", str(unfinished)], capsys, 2)
    assert not (unfinished / "report.html").exists()
