"""Ranks that would run different things say so before anything is loaded, all of them alike."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dist_peft.app.run_identity import describe_run_values, flatten_rank_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from tests.support.dist import run_ranks
from tests.support.equality import build
from tests.support.rank_inputs import Tree, changed, other_inputs
from tests.support.story_runs import train
from tests.support.tiny_runs import save_records, tiny_tree

# what rank 1 has in another way, and the key that the message names
KEYS: dict[str, tuple[str, object, str]] = {
    "lr": ("train.lr", 0.5, "train.lr is 0.01 on rank 0 (HOST) and 0.5 on rank 1 (HOST)"),
    "seed": ("train.seed", 1, "train.seed is 0 on rank 0"),
    "max_grad_norm": ("train.max_grad_norm", 9.0, "train.max_grad_norm is 1.0 on rank 0"),
    "steps": ("train.steps", 7, "train.steps is 3 on rank 0"),
    "global_batch": ("train.global_batch", 4, "train.global_batch is 2 on rank 0"),
    "check_every": ("train.check_every", 0, "train.check_every is 100 on rank 0"),
    "r": ("adapter.r", 5, "adapter.r is 4 on rank 0"),
    "method": ("adapter", {"kind": "prefix"}, 'adapter.kind is "lora" on rank 0'),
    "quant": ("base.quant", {"kind": "nf4"}, "base.quant is null on rank 0"),
    "engine": ("engine.kind", "zero", 'engine.kind is "auto: fsdp2" on rank 0'),
    "timeout": ("engine.timeout_minutes", 5.0, "engine.timeout_minutes is 30.0 on rank 0"),
    "save.every": ("save.every", 2, "save.every is 1 on rank 0"),
    "save.dir": ("save.dir", "/nowhere/run", "save.dir is "),
    "resume": ("resume", "never", 'resume is "auto" on rank 0'),
    "loss_on": ("data.loss_on", "all", 'data.loss_on is "completion" on rank 0'),
    "columns": ("data.eval", [], "data.eval"),
}


def refusal(world: World, tree: Tree) -> str:
    try:
        code = train(world, tree)
    except UserError as error:
        return str(error).replace(world.host, "HOST")
    return f"ended with {code}"


def _refusals(world: World, trees: list[tuple[Tree, Tree]]) -> list[str]:
    return [refusal(world, pair[min(world.rank, 1)]) for pair in trees]


@pytest.mark.dist
def test_every_difference_is_named_by_key_on_every_rank(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path)
    others = {name: (changed(tree, k, v), text) for name, (k, v, text) in KEYS.items()}
    others |= other_inputs(tree, tmp_path / "rank1")
    found = run_ranks(_refusals, 2, [(tree, other) for other, _ in others.values()])
    assert found[0] == found[1]
    for (name, (_, text)), message in zip(others.items(), found[0], strict=True):
        assert "the ranks of this run do not have the same" in message, (name, message)
        assert text in message, (name, message)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.dist
def test_same_contents_elsewhere_are_the_same_run(tmp_path: Path) -> None:
    """Node-local copies and caches; three ranks of which two differ from the first."""
    tree = tiny_tree(tmp_path, train__global_batch=3, train__check_every=1)
    local = tmp_path / "local"
    shutil.copytree(tree["base"]["path"], local / "model")
    other = changed(tree, "base.path", str(local / "model"))
    other = changed(other, "data.train", [str(save_records(local / "train.jsonl"))])
    other = changed(other, "data.cache_dir", str(local / "cache"))
    assert run_ranks(_refusals, 3, [(tree, other)]) == [["ended with 0"]] * 3
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("ranks hold equal copies") == 4  # at the start, and after each step


def test_configuration_never_raises(tmp_path: Path) -> None:
    """A rank whose configuration cannot work must come to the comparison like the others."""
    tree = tiny_tree(tmp_path, engine={"kind": "single", "deepspeed_config": "/nowhere.json"})
    values = flatten_rank_config(parse_config(tree), World(1, 2, 1, 2))
    assert values["engine.kind"] == "single"
    assert str(values["contents of engine.deepspeed_config"]).startswith("unreadable")
    assert not any(key.endswith((".path", "cache_dir")) for key in values)


def test_relative_save_dir_of_another_directory_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(tiny_tree(tmp_path, save={"dir": "run"}))
    monkeypatch.chdir(tmp_path)
    here = flatten_rank_config(config, World())["save.dir"]
    assert here == str(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "base")
    assert flatten_rank_config(config, World())["save.dir"] != here


def test_values_of_a_run_are_json_and_whole(tmp_path: Path) -> None:
    config, built, loaders, _ = build(World(), tiny_tree(tmp_path))
    values = describe_run_values(config, built.setup, loaders, World())
    assert json.loads(json.dumps(values)) == values
    assert values["adapter.r"] == 4 and values["train.betas"] == [0.9, 0.999]
    assert str(values["contents of data.train"]).startswith("8 rows, fingerprint ")
    assert (values["number of steps"], values["number of ranks"]) == (3, 1)
    assert values["version of torch"] == torch.__version__
