"""Paths of a configuration whose run directory was moved."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dist_peft.core.config.io import load_config, load_run_config
from dist_peft.core.config.moved_paths import format_path_record, resolve_moved_paths
from dist_peft.core.errors import UserError


def make_tree(**changes: Any) -> dict[str, Any]:
    return {
        "base": {"path": "project/base"},
        "adapter": {"kind": "lora", "adapters": None},
        "data": {"train": [{"path": "project/a.jsonl"}, {"path": "org/hub"}], "eval": []},
        "engine": {"deepspeed_config": None},
        "save": {"dir": "project/run"},
        **changes,
    }


@pytest.fixture(name="run")
def _run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "project" / "run"
    run.mkdir(parents=True)
    (run.parent / "base").mkdir()
    (run.parent / "a.jsonl").touch()
    (run / "paths.json").write_text(format_path_record(make_tree(), run))
    return run


def resolve(run: Path, **changes: Any) -> dict[str, Any]:
    tree = make_tree(**changes)
    resolve_moved_paths(tree, run)
    return tree


def test_a_run_at_its_place_keeps_its_paths(run: Path) -> None:
    assert resolve(run) == make_tree()


def test_moved_with_its_files_and_read_from_elsewhere(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project").rename(tmp_path / "other")
    monkeypatch.chdir("/")
    found = resolve(tmp_path / "other" / "run")
    assert found["base"]["path"] == str(tmp_path / "other" / "base")
    paths = [source["path"] for source in found["data"]["train"]]
    assert paths == [str(tmp_path / "other" / "a.jsonl"), "org/hub"]
    assert found["save"]["dir"] == str(tmp_path / "other" / "run")


def test_moved_alone(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.move(run, tmp_path / "deep" / "er")
    monkeypatch.chdir("/")
    found = resolve(tmp_path / "deep" / "er")
    assert found["base"]["path"] == str(tmp_path / "project" / "base")
    assert found["save"]["dir"] == str(tmp_path / "deep" / "er")


def test_a_path_that_was_overridden_stays(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    found = resolve(run, base={"path": "mine"}, save={"dir": "new"})
    assert (found["base"]["path"], found["save"]["dir"]) == ("mine", "new")


def test_what_is_gone_keeps_its_name(run: Path) -> None:
    (run.parent / "base").rmdir()
    assert resolve(run)["base"]["path"] == "project/base"


def test_files_are_read_so(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "base: {path: project/base}\ndata: {train: [{path: project/a.jsonl}]}\n"
    (run / "config.yaml").write_text(text)
    (run / "mine.yaml").write_text(text)
    monkeypatch.chdir("/")
    here = str(tmp_path / "project" / "base")
    assert load_run_config(run / "config.yaml", trust_remote_code=False).base.path == here
    assert load_config(run / "config.yaml", ["base.path=x"]).base.path == "x"
    assert load_config(run / "mine.yaml").base.path == "project/base"


DAMAGED = ("", "[]", '{"base.path": 1}', '{"base.path": {"given": "project/base"}}')


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_record_is_refused(run: Path, text: str) -> None:
    (run / "paths.json").write_text(text)
    with pytest.raises(UserError, match=r"paths\.json is damaged"):
        resolve(run)
    assert json.dumps(make_tree())
