import json
from pathlib import Path

import pytest

from dist_peft.app.cli import main
from tests.support.command_line import lines
from tests.support.compared_runs import make_run


def test_text_json_and_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = [str(make_run(tmp_path / "a", 8, 2.0)), str(make_run(tmp_path / "b", 16, 1.5))]
    assert "1.5000, b." in lines(["compare", *pair], capsys)
    found = json.loads(lines(["compare", *pair, "--json"], capsys))
    assert set(found) == {"runs", "configuration", "environment"}
    picture = tmp_path / "x.svg"
    lines(["compare", *pair, "--out", str(picture)], capsys)
    assert picture.read_text().startswith("<svg ")
    message = lines(["compare", *pair, "--out", str(tmp_path / "x.png")], capsys, 2)
    assert ".html or .svg" in message and not (tmp_path / "x.png").exists()
    assert "two or more" in lines(["compare", pair[0]], capsys, 2)


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["compare"])
