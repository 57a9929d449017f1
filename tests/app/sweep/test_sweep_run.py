"""Each point of a sweep is the run of its adapter alone, on every engine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_peft.app.tasks import refuse_separate_tasks
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.train.step_metrics import read_metrics
from tests.support.dist import run_ranks
from tests.support.story_runs import train
from tests.support.sweep_runs import POINTS, alone, assert_same_run, sweep_tree, train_until

pytestmark = pytest.mark.e2e

NAMES = [f"point-{number:03}" for number in range(len(POINTS))]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    close_log()


def all_trained(world: World, trees: list[dict[str, Any]]) -> list[int]:
    """Several runs in one set of processes."""
    return [train(world, tree) for tree in trees]


def gathered_bytes(run: Path) -> int:
    return read_metrics(run / "metrics.jsonl")[1].bytes_gathered


def test_points_are_their_runs_alone_also_after_a_stop(tmp_path: Path) -> None:
    """The signal comes between two points of a step, so that they resume at different ones."""
    tree = sweep_tree(tmp_path)
    assert train_until(tree, asked=5) == 75
    close_log()
    steps = [len(read_metrics(tmp_path / "run" / name / "metrics.jsonl")) for name in NAMES]
    assert steps == [3, 2, 2]
    assert train(World(), tree) == 0
    close_log()
    for name in NAMES:
        point = tmp_path / "run" / name
        assert train(World(), alone(point, tmp_path / name)) == 0
        close_log()
        assert_same_run(point, tmp_path / name)
    ranking = json.loads((tmp_path / "run/ranking.json").read_text())["points"]
    losses = [point["held_out_loss"] for point in ranking]
    assert losses == sorted(losses) and len(losses) == len(NAMES)
    assert "point-002" in (tmp_path / "run/report.html").read_text()
    with pytest.raises(UserError, match=r"is a sweep .* --run .*point-000"):
        refuse_separate_tasks(tmp_path / "run")
    before = (tmp_path / "run/point-000/metrics.jsonl").stat()
    assert train(World(), tree) == 0  # nothing is left to train
    assert (tmp_path / "run/point-000/metrics.jsonl").stat() == before


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 3])
def test_points_on_fsdp2_are_their_runs_on_one_process(tmp_path: Path, ranks: int) -> None:
    """And a step gathers the base once for all of them."""
    tree = sweep_tree(tmp_path)
    one = {**tree, "sweep": None, "save": {**tree["save"], "dir": str(tmp_path / "one")}}
    assert run_ranks(all_trained, ranks, [tree, one]) == [[0, 0]] * ranks
    close_log()
    for name in NAMES:
        point = tmp_path / "run" / name
        assert train(World(), alone(point, tmp_path / name)) == 0
        close_log()
        assert_same_run(point, tmp_path / name)
    joined, single = gathered_bytes(tmp_path / "run/point-000"), gathered_bytes(tmp_path / "one")
    assert joined < 1.7 * single  # adapters of three points, the base once


def test_worst_points_stop_and_a_diverged_one_leaves_the_others_alone(tmp_path: Path) -> None:
    points = [{"lr": lr} for lr in (1e-4, 1e-2, 1e-3, 1e30)]
    sweep = {"points": points, "halving": {"every": 2}}
    tree = sweep_tree(tmp_path, sweep=sweep, train__steps=6)
    assert train(World(), tree) == 0
    records = json.loads((tmp_path / "run/sweep.json").read_text())["points"]
    assert [(r["state"], r["step"]) for r in records] == [
        ("halved", 2),
        ("finished", 6),
        ("halved", 4) if records[3]["state"] == "failed" else ("halved", 2),
        (records[3]["state"], records[3]["step"]),
    ]
    assert records[3]["state"] == "failed" and "not finite" in records[3]["reason"]
    assert (tmp_path / "run/point-000/adapter").is_dir()


def test_refused_changes_nothing(tmp_path: Path) -> None:
    tree = sweep_tree(tmp_path, sweep={"target_modules": ["all-linear", ["no_such"]]})
    with pytest.raises(UserError, match="no_such"):
        train(World(), tree)
    assert not (tmp_path / "run").exists()
