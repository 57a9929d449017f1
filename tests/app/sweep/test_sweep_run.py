"""Each point of a sweep is the run of its adapter alone, on every engine."""

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dist_peft.app import trainer as trainer_app
from dist_peft.app.tasks import refuse_separate_tasks
from dist_peft.core.config.io import parse_config
from dist_peft.core.config.sweep_points import split_sweep_configs
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.train.step_metrics import read_metrics
from tests.support.dist import run_ranks
from tests.support.exact_runs import digest_losses, digest_state
from tests.support.story_runs import train
from tests.support.sweep_runs import POINTS, alone, assert_same_run, sweep_tree, train_until
from tests.support.tiny_runs import save_records

pytestmark = pytest.mark.e2e

ENGINES: dict[str, dict[str, Any]] = {
    "fsdp2": {"kind": "fsdp2"},
    "zero 1": {"kind": "zero", "stage": 1},
    "zero 2": {"kind": "zero", "stage": 2},
    "zero 3": {"kind": "zero", "stage": 3},
}
NAMES = [f"point-{number:03}" for number in range(len(POINTS))]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    close_log()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A sweep, and a directory with each of its points as trained alone, on one process."""
    directory = tmp_path_factory.mktemp("alone")
    tree = sweep_tree(directory)
    for name, config in split_sweep_configs(parse_config(tree)).items():
        own = config.model_dump(mode="json")
        assert train(World(), {**own, "save": {**own["save"], "dir": str(directory / name)}}) == 0
        close_log()
    return tree, directory


def train_until_killed(world: World, tree: dict[str, Any]) -> int:
    """Rank 1 is killed in the third step of the last point."""
    noted = 0

    def die(step: int) -> None:
        nonlocal noted
        noted += 1
        if world.rank == 1 and noted == 3 * len(NAMES):
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(trainer_app, "note_step", die):
        return train(world, tree)


def on_engine(tree: dict[str, Any], run: Path, engine: dict[str, Any]) -> dict[str, Any]:
    return {**tree, "engine": engine, "save": {**tree["save"], "dir": str(run)}}


def all_trained(world: World, trees: list[dict[str, Any]]) -> list[int]:
    """Several runs in one set of processes."""
    return [train(world, tree) for tree in trees]


def digest_run(run: Path) -> tuple[str, str, str]:
    weights = (run / "adapter/adapter_model.safetensors").read_bytes()
    return hashlib.sha256(weights).hexdigest(), digest_state(run), digest_losses(run)


def gathered_bytes(run: Path) -> int:
    return read_metrics(run / "metrics.jsonl")[1].bytes_gathered


def test_points_are_their_runs_alone_also_after_a_stop(
    one_process: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """The signal comes between two points of a step, so that they resume at different ones."""
    tree = on_engine(one_process[0], tmp_path / "run", {})
    assert train_until(tree, asked=5) == 75
    close_log()
    steps = [len(read_metrics(tmp_path / "run" / name / "metrics.jsonl")) for name in NAMES]
    assert steps == [3, 2, 2]
    assert train(World(), tree) == 0
    close_log()
    for name in NAMES:
        assert_same_run(tmp_path / "run" / name, one_process[1] / name)
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
@pytest.mark.parametrize(
    "ranks", [pytest.param(size, marks=pytest.mark.turn(size % 2, 2)) for size in (2, 3)]
)
def test_points_on_ranks_are_their_runs_on_one_process(
    one_process: tuple[dict[str, Any], Path], tmp_path: Path, ranks: int
) -> None:
    """On every engine, and a step gathers the base once for all of them. ZeRO 3 comes last: it
    replaces ``torch.nn.functional.linear`` in its process for good."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    tree, own_runs = one_process
    sweeps = [on_engine(tree, tmp_path / name, engine) for name, engine in ENGINES.items()]
    ones = [
        {**on_engine(tree, tmp_path / f"one {name}", ENGINES[name]), "sweep": None}
        for name in ("fsdp2", "zero 2")
    ]
    assert run_ranks(all_trained, ranks, [*ones, *sweeps]) == [[0] * 6] * ranks
    for name in ENGINES:
        for point in NAMES:
            assert_same_run(tmp_path / name / point, own_runs / point)
    for name in ("fsdp2", "zero 2"):
        joined = gathered_bytes(tmp_path / name / "point-000")
        single = gathered_bytes(tmp_path / f"one {name}")
        assert joined < 1.7 * single  # adapters of three points, the base once


@pytest.mark.dist
def test_points_of_a_killed_sweep_continue_on_other_ranks(
    one_process: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """A rank of three is killed after the second checkpoints; two ranks of ZeRO resume."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    tree = on_engine(one_process[0], tmp_path / "run", {"kind": "fsdp2"})
    with pytest.raises(AssertionError, match=r"rank 1 of 3:\nprocess died without a word"):
        run_ranks(train_until_killed, 3, tree)
    steps = [len(read_metrics(tmp_path / "run" / name / "metrics.jsonl")) for name in NAMES]
    assert steps[0] == 3 and not (tmp_path / "run/point-000/adapter").exists()
    assert (tmp_path / "run/point-000/checkpoints/step-000002").is_dir()
    zero = on_engine(one_process[0], tmp_path / "run", ENGINES["zero 2"])
    assert run_ranks(train, 2, zero) == [0, 0]
    for name in NAMES:
        assert_same_run(tmp_path / "run" / name, one_process[1] / name)


def test_points_of_one_residual_base_on_data_of_their_own(tmp_path: Path) -> None:
    """The rest of PiSSA's factors is quantized once, and a resume has the same factors."""
    points = [{"lr": 5e-3}, {"data": str(tmp_path / "other.jsonl"), "use_rslora": False}]
    changes: dict[str, Any] = {"adapter": {"r": 4, "init": "pissa"}, "train__steps": 3}
    tree = sweep_tree(tmp_path, sweep={"points": points}, **changes)
    save_records(tmp_path / "other.jsonl", count=7, words=4)
    assert train_until(tree, asked=4) == 75
    close_log()
    assert train(World(), tree) == 0
    close_log()
    tokens = set()
    for name in NAMES[:2]:
        point = tmp_path / "run" / name
        assert train(World(), alone(point, tmp_path / name)) == 0
        close_log()
        assert_same_run(point, tmp_path / name)
        tokens.add(sum(record.tokens for record in read_metrics(point / "metrics.jsonl")))
    assert len(tokens) == 2
    assert (
        "other.jsonl"
        in json.loads((tmp_path / "run/sweep.json").read_text())["points"][1]["values"]["data"][0][
            "path"
        ]
    )


@pytest.mark.dist
def test_exact_points_have_the_bits_of_their_runs_alone(tmp_path: Path) -> None:
    """Adapters, moments and losses, on one process and on two ranks of each engine."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    exact = {"train__exact": True, "train__micro_batch": 1, "train__steps": 2}
    tree = sweep_tree(tmp_path, **exact)
    assert train(World(), tree) == 0
    close_log()
    engines = {name: ENGINES[name] for name in ("fsdp2", "zero 3")}
    sweeps = [on_engine(tree, tmp_path / name, engine) for name, engine in engines.items()]
    ones = [
        {**on_engine(tree, tmp_path / f"one {name}", engine), "sweep": None}
        for name, engine in engines.items()
    ]
    # FSDP2 first: ZeRO 3 replaces torch.nn.functional.linear for good
    trees = [ones[0], sweeps[0], sweeps[1], ones[1]]
    assert run_ranks(all_trained, 2, trees) == [[0] * 4] * 2
    for name in NAMES:
        assert train(World(), alone(tmp_path / "run" / name, tmp_path / name)) == 0
        close_log()
        wanted = digest_run(tmp_path / name)
        for directory in ("run", *engines):
            assert digest_run(tmp_path / directory / name) == wanted, directory
    assert len({digest_run(tmp_path / name) for name in NAMES}) == len(NAMES)
    for name in engines:  # of three points, less than those of two runs
        joined = gathered_bytes(tmp_path / name / NAMES[0])
        assert joined < 1.5 * gathered_bytes(tmp_path / f"one {name}")


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
