"""A step that is not finite: nothing is poisoned, the culprit is named, counts survive a resume."""

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dist_peft.app.commands import train as train_app
from dist_peft.core.config.io import parse_config
from dist_peft.core.config.run import TrainConfig
from dist_peft.core.errors import RunFailure
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.data.files import RecordPlace
from dist_peft.data.loader import Batch
from dist_peft.train.nonfinite import (
    LONGEST_TEXT,
    MOST_SEQUENCES,
    FailedStep,
    NonFiniteSteps,
    SequenceDescriber,
)
from dist_peft.train.objective import TokenObjective
from dist_peft.train.run_position import read_position
from dist_peft.train.run_state import read_run_state
from dist_peft.train.step_metrics import StepMetrics, read_metrics
from tests.support.dist import run_ranks
from tests.support.pickles import count_pickles
from tests.support.row_sets import UnevenRows
from tests.support.tiny_runs import tiny_tree

BAD = 5
"""The sample that makes numbers of its micro-batch not finite: one of every second step."""


def poison(kind: str) -> Any:
    real = TokenObjective.compute_loss

    def compute_loss(self: Any, model: Any, batch: Batch, *rest: Any) -> Tensor:
        loss = real(self, model, batch, *rest)
        if BAD not in batch.sample_ids.tolist():
            return loss
        if kind == "infinite loss with a finite gradient":
            return loss + math.inf
        if kind == "gradient":
            return loss.detach() + (loss - loss.detach()).abs().sqrt()  # slope at 0: infinite
        return loss * math.nan

    return mock.patch.object(TokenObjective, "compute_loss", compute_loss)


def tree_of(directory: Path, name: str, **changes: Any) -> dict[str, Any]:
    tree = tiny_tree(directory, data__eval=[], save={"dir": str(directory / name), "every": 3})
    tree["train"] |= {"global_batch": 4, "shuffle": False, "schedule": "constant", "warmup": 0}
    tree["train"] |= {"steps": 5, **changes.pop("train", {})}
    return {**tree, **changes}


def train(world: World, tree: dict[str, Any], kind: str = "loss") -> int | str:
    """The exit code, or the message of a run that fails."""
    try:
        with poison(kind):
            return train_app.train_from_config(parse_config(tree), world)
    except RunFailure as error:
        return str(error)
    finally:
        close_log()


def adapter(run: Path) -> dict[str, Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def records(run: Path) -> list[StepMetrics]:
    return read_metrics(run / "metrics.jsonl")


def run_engine(world: World, directory: Path, engine: dict[str, Any]) -> list[int | str]:
    """Stop; skip to the end; the same with a resume between. No rank sends pickles meanwhile."""
    name = "-".join(map(str, (*engine.values(), world.size)))
    skip = {"on_nonfinite": "skip"}

    def train_case(case: str, **settings: Any) -> int | str:
        return train(world, tree_of(directory, f"{name} {case}", train=settings, engine=engine))

    with count_pickles() as pickles:
        results = [
            train_case("stop"),
            train_case("whole", **skip),
            train_case("cut", **skip, steps=3),
            train_case("cut", **skip),
        ]
    assert pickles == []  # also in FSDP2, DeepSpeed and torch's checkpoints
    return results


def check_engine(directory: Path, name: str, results: list[list[int | str]]) -> None:
    ranks = len(results)
    assert all(result == results[0] for result in results), results
    stopped, *codes = results[0]
    where = "" if ranks == 1 else f" on rank {1 % ranks}"
    assert isinstance(stopped, str)
    place = f"{directory / 'train.jsonl'}, record 6"
    assert stopped.startswith(
        f"step 2: loss nan, gradient norm nan: not finite;{where} in a micro-batch with sample 5 "
        f"(data.train[0]: {place}); no update was made"
    )
    assert codes == [0, 0, 0]

    whole, cut = directory / f"{name} whole", directory / f"{name} cut"
    assert [math.isfinite(r.grad_norm) for r in records(whole)] == [True, False, True, False, True]
    assert [r.nonfinite_steps for r in records(whole)] == [None, 1, 1, 2, 2]
    assert [r.nonfinite_steps for r in records(cut)] == [None, 1, 1, 2, 2]
    numbers = [[r.loss for r in records(run)][::2] for run in (whole, cut)]
    assert numbers[0] == numbers[1] and numbers[0][2] < numbers[0][0]
    found, wanted = adapter(cut), adapter(whole)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)  # Adam's count as well
    last = read_position(whole / "checkpoints" / "step-000005")
    assert last.nonfinite_steps == [2, 4] and last.lr_halvings == 0

    stop = directory / f"{name} stop"
    state = read_run_state(stop)
    assert state is not None and (state.state, state.step) == ("failed", 1)
    assert state.reason == stopped
    # the step before is saved, though save.every is 3
    assert [p.name for p in (stop / "checkpoints").iterdir()] == ["step-000001"]
    (file,) = (stop / "nonfinite").iterdir()
    assert file.name == f"step-000002.rank-{1 % ranks}.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    (part,) = json.loads(file.read_text())["micro_batches"]
    (sample,) = part["samples"]
    assert part["loss"] == "nan" and sample["sample"] == BAD
    assert sample["records"] == [
        {"source": "data.train[0]", "file": str(directory / "train.jsonl"), "record": 6}
    ]
    line = json.loads((directory / "train.jsonl").read_text().splitlines()[BAD])
    assert line["completion"].partition(" ")[2] in sample["text"]


@pytest.mark.e2e
def test_one_process(tmp_path: Path) -> None:
    result = run_engine(World(), tmp_path, {"kind": "single"})
    check_engine(tmp_path, "single-1", [result])


@pytest.mark.dist
def test_fsdp2_on_three_ranks(tmp_path: Path) -> None:
    results = run_ranks(run_engine, 3, tmp_path, {"kind": "fsdp2"})
    check_engine(tmp_path, "fsdp2-3", results)


def run_zero(world: World, directory: Path) -> list[list[int | str]]:
    return [run_engine(world, directory, {"kind": "zero", "stage": stage}) for stage in (2, 3)]


@pytest.mark.dist
def test_zero_on_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    results = run_ranks(run_zero, 2, tmp_path)
    for number, stage in enumerate((2, 3)):
        check_engine(tmp_path, f"zero-{stage}-2", [result[number] for result in results])


@pytest.mark.parametrize("kind", ["infinite loss with a finite gradient", "gradient"])
def test_every_kind_is_noticed_and_located(kind: str, tmp_path: Path) -> None:
    tree = tree_of(tmp_path, "run", train={"on_nonfinite": "halve", "steps": 5})
    assert train(World(), tree, kind) == 0
    lrs = [r.lr for r in records(tmp_path / "run")]
    assert lrs == [1e-2, 1e-2, 5e-3, 5e-3, 2.5e-3]
    position = read_position(tmp_path / "run" / "checkpoints" / "step-000005")
    assert (position.nonfinite_steps, position.lr_halvings) == ([2, 4], 2)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "the learning rate is halved (now 1/4 of train.lr's)" in log
    for step in (2, 4):
        (file,) = (tmp_path / "run" / "nonfinite").glob(f"step-00000{step}.*")
        (part,) = json.loads(file.read_text())["micro_batches"]
        assert [s["sample"] for s in part["samples"]] == [BAD]
    tree["train"] |= {"steps": 7}
    assert train(World(), tree, kind) == 0
    assert records(tmp_path / "run")[-1].lr == 1.25e-3  # step 6 halved it a third time


def test_limit_ends_the_run(tmp_path: Path) -> None:
    tree = tree_of(tmp_path, "run", train={"on_nonfinite": "skip", "max_nonfinite": 1})
    told = train(World(), tree)
    assert isinstance(told, str)
    assert told.startswith("step 4: ") and "steps before that were not finite: 1" in told
    # the failed step is not counted: a resume does it again
    assert read_position(tmp_path / "run" / "checkpoints" / "step-000003").nonfinite_steps == [2]
    assert train(World(), {**tree, "train": {**tree["train"], "max_nonfinite": 2}}) == 0


class ManyRows(UnevenRows):
    def list_records(self, index: int) -> list[tuple[int, RecordPlace]]:
        return [(0, RecordPlace("a.jsonl", index + 1))] * 100


def test_file_is_bounded(tmp_path: Path) -> None:
    rows = ManyRows([3] * 200)
    empty = torch.zeros(200, 1, dtype=torch.long)
    batch = Batch(empty, empty, empty, torch.arange(200))
    describer = SequenceDescriber(rows, lambda ids: "ä" * 100_000)
    steps = NonFiniteSteps.from_config(TrainConfig(on_nonfinite="skip"))
    failed = FailedStep(7, math.inf, math.nan, 1e-3, [batch, batch], [math.inf, 1.0], [True, True])
    steps.handle_step(failed, World(), tmp_path, describer)
    (file,) = (tmp_path / "nonfinite").iterdir()
    first, second = json.loads(file.read_text())["micro_batches"]
    assert (len(first["samples"]), first["num_samples"], second["samples"]) == (
        MOST_SEQUENCES,
        200,
        [],
    )
    assert len(first["samples"][0]["text"]) == LONGEST_TEXT
    assert first["samples"][0]["num_characters"] == 100_000
    assert steps.steps == [7]


def test_unwritable_file_does_not_hide_the_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "nonfinite").write_text("a file")
    empty = torch.zeros(1, 1, dtype=torch.long)
    batch = Batch(empty, empty, empty, torch.tensor([3]))
    failed = FailedStep(7, 1.0, math.nan, 1e-3, [batch], [1.0])
    describer = SequenceDescriber(UnevenRows([3] * 4), lambda ids: "text")
    with pytest.raises(RunFailure, match="no micro-batch alone shows it"):
        NonFiniteSteps.from_config(TrainConfig()).handle_step(failed, World(), tmp_path, describer)
    assert "the sequences of step 7 cannot be written" in caplog.text
