"""``dist-peft quantize``: the same packed bytes at any number of ranks, and what is refused."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dist_peft.app import cli
from dist_peft.app.commands.train import train_from_config
from dist_peft.compress.gptq_driver import _GptqSolver
from dist_peft.core.config.io import load_config, parse_config
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from tests.support.dist import run_ranks
from tests.support.quantized_runs import GPTQ, make_gptq_tree
from tests.support.quantized_runs import write_quantized as write
from tests.support.tiny_runs import save_config, save_records

pytestmark = pytest.mark.e2e


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    return make_gptq_tree(tmp_path)


def on_two_ranks(world: World, tree: dict[str, Any], out: Path) -> None:
    write(world, tree, out / "fsdp2")
    write(world, {**tree, "engine": {"kind": "zero"}}, out / "zero")
    write(world, {**tree, "engine": {"shard_base": False}}, out / "whole")


def on_three_ranks(world: World, tree: dict[str, Any], out: Path) -> None:
    write(world, tree, out / "three")
    write(world, with_samples(tree, 2), out / "a rank without a sample")


def with_samples(tree: dict[str, Any], count: int) -> dict[str, Any]:
    quant = {**tree["base"]["quant"], "calibration_samples": count}
    return {**tree, "base": {**tree["base"], "quant": quant}}


@pytest.mark.dist
def test_packed_bytes_do_not_depend_on_ranks(tree: dict[str, Any], tmp_path: Path) -> None:
    write(World(), tree, tmp_path / "single")
    run_ranks(on_two_ranks, 2, tree, tmp_path)
    run_ranks(on_three_ranks, 3, tree, tmp_path)
    expected = (tmp_path / "single" / "model.safetensors").read_bytes()
    for name in ("fsdp2", "zero", "whole", "three"):
        assert (tmp_path / name / "model.safetensors").read_bytes() == expected, name
    write(World(), with_samples(tree, 2), tmp_path / "two samples")
    two = (tmp_path / "two samples" / "model.safetensors").read_bytes()
    found = (tmp_path / "a rank without a sample" / "model.safetensors").read_bytes()
    assert found == two != expected


def test_command(tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    file = str(save_config(tmp_path, tree))
    assert cli.main(["quantize", "--config", file, "--out", str(out), "base.quant.bits=2"]) == 0
    assert json.loads((out / "config.json").read_text())["quantization_config"]["bits"] == 2
    assert cli.main(["quantize", "--config", file, "--out", str(out)]) == 2
    assert f"{out} is not empty; choose a new directory" in capsys.readouterr().err
    close_log()


def test_what_is_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["base"]["quant"] = {**GPTQ, "calibration_tokens": 4000}
    tree["base"]["path"] = str(tmp_path / "base")
    with pytest.raises(UserError, match=r"data\.train has \d+ tokens, less than a calibration seq"):
        write(
            World(), {**tree, "data": {**tree["data"], "train": [short(tmp_path)]}}, tmp_path / "o"
        )
    tree["base"]["quant"] = None
    with pytest.raises(UserError, match=r"base\.quant is null: there is nothing to quantize"):
        write(World(), tree, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def short(directory: Path) -> str:
    return str(save_records(directory / "short.jsonl", 2, 3))


SOLVE_BLOCK = _GptqSolver._solve_block


def train_stopped(world: World, tree: dict[str, Any], asked: int) -> int:
    """``train`` with a signal that rank 1 has seen when it is asked for the n-th time."""
    calls = iter(range(1, 1000))

    def stop() -> bool:
        return next(calls) == asked and world.rank == world.size - 1

    where = "dist_peft.app.commands.train.catch_stop_signals"
    with mock.patch(where, return_value=nullcontext(stop)):
        return train_from_config(parse_config(tree), world)


@pytest.mark.dist
def test_stopped_solve_resumes_after_its_last_block(tree: dict[str, Any], tmp_path: Path) -> None:
    """Stopped on two ranks in the second block, resumed on one: the bytes of a whole solve."""
    run = tmp_path / "run"
    assert run_ranks(train_stopped, 2, tree, 9) == [75, 75]
    told = (run / "log.txt").read_text()
    assert "stopped on a signal before a step was done; rerun the same command to resume" in told
    assert "block 1 of 2" in told and "block 2" not in told
    assert not (run / "base").exists()
    (kept,) = run.glob(".*")
    assert [file.name for file in kept.iterdir()] == ["block-00000.safetensors"]
    tree["train"]["steps"] = 1
    with mock.patch.object(_GptqSolver, "_solve_block", autospec=True) as solve:
        solve.side_effect = SOLVE_BLOCK
        assert train_from_config(parse_config(tree), World()) == 0
    assert [call.args[1] for call in solve.call_args_list] == [1]
    assert not list(run.glob(".*"))
    write(World(), tree, tmp_path / "whole")
    names = [tmp_path / part / "model.safetensors" for part in ("run/base", "whole")]
    assert names[0].read_bytes() == names[1].read_bytes()


def on_the_base_of_a_run(directory: Path, tree: dict[str, Any]) -> dict[str, Any]:
    return {**tree, "base": {**tree["base"], "path": str(directory / "run" / "base")}}


def test_training_solves_once_and_goes_on_there(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["train"]["steps"] = 1
    assert train_from_config(parse_config(tree), World()) == 0
    packed = (tmp_path / "run" / "base" / "model.safetensors").read_bytes()
    write(World(), tree, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == packed
    kept = load_config(tmp_path / "run" / "config.yaml")
    assert kept.base.path == str(tmp_path / "run" / "base")
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tmp_path / "base")
    tree["train"]["steps"] = 2
    assert train_from_config(parse_config(tree), World()) == 0
    told = (tmp_path / "run" / "log.txt").read_text()
    assert "the base was solved before" in told and "at step 1" in told
    assert "has no effect" not in told
    with_config = ["eval", "--config", str(save_config(tmp_path, tree))]
    assert cli.main([*with_config, "--run", str(tmp_path / "run")]) == 0
    assert cli.main(with_config) == 2  # rounding to nearest is not what was asked for
    tree["train"]["seed"] = 5
    with pytest.raises(UserError, match=r"run/base was made from another calibration \(seed"):
        train_from_config(parse_config(tree), World())
    with pytest.raises(UserError, match=r"is quantized already \(dist_peft\)"):
        write(World(), on_the_base_of_a_run(tmp_path, tree), tmp_path / "again")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert cli.main(["merge", "--run", str(moved), "--out", str(tmp_path / "merged")]) == 0
    close_log()
