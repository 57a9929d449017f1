import json
from pathlib import Path

import pytest

from dist_peft.app import comparison_page
from dist_peft.app.comparison_page import (
    collect_comparison,
    format_comparison,
    summarize_comparison,
    write_comparison,
)
from dist_peft.app.run_comparison import ComparedRun, read_runs
from dist_peft.core.errors import UserError
from tests.support.compared_runs import make_run


@pytest.fixture
def runs(tmp_path: Path) -> list[ComparedRun]:
    return read_runs([make_run(tmp_path / "a", 8, 2.0), make_run(tmp_path / "<b>", 16, 1.5)])


def test_text(runs: list[ComparedRun]) -> None:
    lines = format_comparison(runs)
    assert lines[0] == "Lowest held-out loss at the end: 1.5000, <b>."
    assert "Configuration: keys that differ" in lines
    assert any(line.split() == ["adapter.r", "8", "16"] for line in lines)


def test_losses_on_other_data_are_not_compared_in_silence(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "a", 8, 2.0), make_run(tmp_path / "b", 8, 1.5)
    config = two / "config.yaml"
    config.write_text(config.read_text().replace("held_out", "other"))
    text = summarize_comparison(read_runs([one, two]))
    assert "differ in data.eval[0].path: their losses may not be comparable" in text


def test_json(runs: list[ComparedRun]) -> None:
    found = json.loads(json.dumps(collect_comparison(runs), allow_nan=False))
    assert found["runs"]["a"]["held_out_loss"] == 2.0
    assert found["configuration"]["adapter.r"] == {"a": 8, "<b>": 16}


def test_page_and_picture(
    runs: list[ComparedRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[dict[str, object]] = []
    monkeypatch.setattr(
        comparison_page,
        "draw_overlay",
        lambda runs, **how: drawn.append(how) or f"<svg>{len(runs)}",
    )
    write_comparison(runs, tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text()
    assert "&lt;b&gt;" in page and "<b>" not in page and page.count("<svg>2") == 2
    write_comparison(runs, tmp_path / "x.svg")
    assert (tmp_path / "x.svg").read_text() == "<svg>2"
    assert drawn[-1] == {"is_wide": True, "is_file": True}


@pytest.mark.parametrize(("name", "message"), [("x.png", "written as"), ("no/x.svg", "directory")])
def test_refused_files(runs: list[ComparedRun], tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_comparison(runs, tmp_path / name)
