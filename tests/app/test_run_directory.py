"""A run directory: what cannot be one is refused without a change, claims, and the probe."""

import json
import logging
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import pytest

from dist_peft.app import run_directory
from dist_peft.app.cli import main
from dist_peft.app.run_directory import RunDirectory, check_shared_directory, write_run_config
from dist_peft.core.config.io import load_config, parse_config
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.train.run_lock import RunLock
from dist_peft.train.run_state import read_run_state
from tests.support.dist import run_ranks
from tests.support.story_runs import losses, train
from tests.support.tiny_runs import tiny_tree

pytestmark = pytest.mark.e2e


def test_directory_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"save\.dir .*file is a file; give a directory"):
        RunDirectory(tmp_path / "file", World()).check_usable()
    with pytest.raises(UserError, match=r"cannot write run directory .*: .*file is a file"):
        RunDirectory(tmp_path / "file" / "a" / "run", World()).check_usable()
    RunDirectory(tmp_path / "new" / "run", World()).check_usable()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def refuse_without_permission(directory: str) -> str:
    """Return the refusal as a user who may not write ``directory``; root may write everywhere."""
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    with pytest.raises(UserError) as refusal:
        RunDirectory(Path(directory) / "run", World()).check_usable()
    return str(refusal.value)


def test_directory_without_permission_is_refused() -> None:
    with TemporaryDirectory() as directory:  # pytest's own are closed to other users
        Path(directory).chmod(0o555)
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            refusal = pool.submit(refuse_without_permission, directory).result()
        Path(directory).chmod(0o700)
    assert f"no permission to write {directory}" in refusal


def test_log_and_configuration(tmp_path: Path) -> None:
    run_dir = tmp_path / "a" / "run"
    config = parse_config(tiny_tree(tmp_path, save__dir=str(run_dir)))
    with RunDirectory(run_dir, World()) as directory:
        directory.open()
        logging.getLogger("dist_peft").warning("a line")
        write_run_config(run_dir, config)
    close_log()
    assert "a line" in (run_dir / "log.txt").read_text()
    assert load_config(run_dir / "config.yaml") == config
    with pytest.raises(UserError, match="cannot write run directory"):
        RunDirectory(run_dir / "log.txt" / "below", World()).open()
    close_log()


def fail_in(directory: RunDirectory, error: Exception) -> None:
    with directory:
        directory.open()
        raise error


def test_a_run_claims_its_directory_and_records_its_end(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    with RunDirectory(run, World()) as directory:
        directory.check_usable()
        assert not run.exists()
        directory.open()
        directory.open()
        assert json.loads((run / "run_state.json").read_text())["state"] == "running"
        with pytest.raises(UserError, match="belongs to another run: process"):
            RunDirectory(run, World()).check_usable()
        with pytest.raises(UserError, match="belongs to another run"):
            RunDirectory(run, World()).open()
        assert directory.record_exit_code(75) == 75
    assert sorted(path.name for path in run.iterdir()) == ["log.txt", "run_state.json"]
    assert json.loads((run / "run_state.json").read_text())["state"] == "stopped"
    before = (run / "run_state.json").read_bytes()
    with pytest.raises(UserError):
        fail_in(RunDirectory(run, World()), UserError("x"))
    assert (run / "run_state.json").read_bytes() == before  # the refused run is another one
    killed = before.replace(b'"stopped"', b'"running"')
    assert killed != before
    (run / "run_state.json").write_bytes(killed)
    with pytest.raises(UserError):
        fail_in(RunDirectory(run, World()), UserError("x"))
    assert json.loads((run / "run_state.json").read_text())["state"] == "refused"
    for directory, error, state in (
        (tmp_path / "new", UserError("x"), "refused"),
        (run, OSError("y"), "failed"),
    ):
        with pytest.raises(type(error)):
            fail_in(RunDirectory(directory, World()), error)
        found = json.loads((directory / "run_state.json").read_text())
        assert found["state"] == state and found["reason"].endswith(str(error))
    close_log()


def test_leftovers_of_killed_runs_are_removed(tmp_path: Path) -> None:
    partial = tmp_path / "checkpoints" / ".partial-step-000007"
    partial.mkdir(parents=True)
    (partial / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / ".config.yaml.0a1b2c3d.tmp").touch()
    (tmp_path / "mine.tmp").touch()
    with RunDirectory(tmp_path, World()) as directory:
        directory.open()
    assert not partial.exists()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoints", "log.txt", "mine.tmp", "run_state.json"}
    close_log()


@mock.patch.object(run_directory, "_SEEN_SECONDS", 0.5)
def probe_directories(world: World, directory: Path) -> list[str]:
    """A shared directory; one of each rank's own; one that rank 0 alone has."""
    (directory / "shared").mkdir(exist_ok=True)
    check_shared_directory(directory / "shared", world)
    world.barrier()
    assert not list((directory / "shared").iterdir())
    texts = []
    own = directory / f"own{world.rank}"
    own.mkdir()
    for path in (own, own if world.is_first else directory / "absent"):
        with pytest.raises(UserError) as caught:
            check_shared_directory(path, world)
        texts.append(str(caught.value))
        assert not list(own.iterdir())
    with RunDirectory(directory / "run" / "deep", world) as run:
        run.open()
        with pytest.raises(UserError):
            RunDirectory(directory / "run" / "deep", world).open()
    close_log()
    return texts


@pytest.mark.dist
def test_a_directory_that_is_not_shared_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = run_ranks(probe_directories, 2, tmp_path)
    assert answers[0] == answers[1]
    unseen, absent = answers[0]
    assert "rank 0 on" in unseen and "does not see" in unseen and "rank 1 wrote" in unseen
    assert "rank 1 on" in absent and "does not see" in absent
    RunLock(tmp_path / "run" / "deep").check_free()


@pytest.mark.parametrize("alone", [False, True], ids=["with its files", "alone"])
def test_a_stopped_run_resumes_after_a_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    """From another working directory, by its own config.yaml, bit for bit as if never moved."""
    project = tmp_path / "project"
    project.mkdir()
    tree = tiny_tree(project, base__path="project/base", adapter={"r": 5, "dropout": 0.1})
    tree["train"] |= {"steps": 4, "eval_every": 2}
    monkeypatch.chdir(tmp_path)
    whole = {**tree, "save": {**tree["save"], "dir": str(tmp_path / "whole")}}
    assert train(World(), whole) == 0
    tree["save"]["dir"] = "project/run"
    assert train(World(), tree, stop_after=2) == 75
    close_log()
    moved = tmp_path / "elsewhere" / "deeper"
    moved.mkdir(parents=True)
    run = (project / "run" if alone else project).rename(moved / "moved")
    run = run if alone else run / "run"
    monkeypatch.chdir("/")
    assert main(["train", "--config", str(run / "config.yaml")]) == 0
    close_log()
    assert losses(run) == losses(tmp_path / "whole") and len(losses(run)) == 4
    name = "adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "project" / "run").exists()
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*"))[-1] == "step-000004"
    # killed after its last step, of which it had recorded none
    file = run / "run_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"state": "running", "step": 0}))
    assert main(["train", "--config", str(run / "config.yaml")]) == 0
    close_log()
    state = read_run_state(run)
    assert state is not None and (state.state, state.step) == ("finished", 4)
