from pathlib import Path
from xml.etree import ElementTree

import pytest

from dist_peft.train import report
from dist_peft.train.plots import draw_plot
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


def test_plots_are_written_as_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "draw_plot", draw_plot)  # other tests do without curves
    run, out = make_run(tmp_path / "a", 8, 2.0), tmp_path / "pictures" / "new"
    shown = lines(["report", str(run), "--pictures", str(out)], capsys).splitlines()
    assert shown[1:] == [str(path) for path in map(Path, shown[1:]) if path.parent == out]
    names = [path.stem for path in map(Path, shown[1:])]
    assert names == ["loss", "lr", "grad_norm", "tokens_per_s", "memory", "stragglers"]
    for path in map(Path, shown[1:]):
        picture = ElementTree.parse(path).getroot()
        assert picture.tag == "{http://www.w3.org/2000/svg}svg" and picture.get("aria-label")
        assert "--plot-curve-1: " in path.read_text()  # colours of its own
    (tmp_path / "file").touch()
    argv = ["report", str(run), "--pictures", str(tmp_path / "file")]
    with skip_curves():
        assert "cannot make directory" in lines(argv, capsys, 2)
