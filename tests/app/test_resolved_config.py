"""One configuration a command: the base that is loaded, its quantization, tasks."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_peft.app.resolved_config import (
    ResolvedConfig,
    SolvedBase,
    find_solved_base,
    resolve_config,
    resolve_finished_run,
    resolve_quantization,
    resolve_unsolved_run,
)
from dist_peft.core.config.io import parse_config
from dist_peft.core.config.run import NoAdapterConfig, QuantConfig, RunConfig
from dist_peft.core.errors import UserError
from tests.support import packed
from tests.support.quantized_runs import GPTQ
from tests.support.tiny_runs import save_records, tiny_tree

INT = {"kind": "int", "group_size": packed.GROUP}


def parse(directory: Path, base: Path | None = None, **quant: Any) -> RunConfig:
    tree = tiny_tree(directory)
    tree["base"]["path"] = str(base or tree["base"]["path"])
    del tree["base"]["quant"]
    if quant:
        tree["base"]["quant"] = quant
    return parse_config(tree)


def test_unquantized_base_leaves_the_configuration(tmp_path: Path) -> None:
    config = parse(tmp_path)
    assert resolve_config(config) == ResolvedConfig(config, tmp_path / "base")


def test_quantization_is_that_of_the_files(tmp_path: Path) -> None:
    base = packed.save_gptq(packed.save_plain(tmp_path / "plain"), tmp_path / "gptq")
    resolved = resolve_config(parse(tmp_path, base))
    assert resolved.run.base.quant == QuantConfig(**INT)
    assert resolve_config(resolved.run) == resolved
    with pytest.raises(UserError, match=r"base\.quant\.kind is nf4, but .*gptq is quantized alr"):
        resolve_config(parse(tmp_path, base, kind="nf4"))


def test_solved_base_takes_the_place_of_the_base(tmp_path: Path) -> None:
    config = parse(tmp_path, **GPTQ)
    with pytest.raises(UserError, match=r"solver is gptq, and base\.path .*base is not quantized"):
        resolve_config(config)
    for unsolved in (resolve_unsolved_run(config), resolve_quantization(config)):
        assert unsolved.is_unsolved and unsolved.directory == tmp_path / "base"
    assert resolve_unsolved_run(config).run.resume == "never"
    assert find_solved_base(config, tmp_path / "run") is None
    assert resolve_finished_run(config, tmp_path / "run") == config
    (tmp_path / "run" / "base").mkdir(parents=True)
    solved = find_solved_base(config, tmp_path / "run")
    assert solved == SolvedBase(tmp_path / "run" / "base")
    moved = resolve_finished_run(config, tmp_path / "run").base
    assert moved.path == str(tmp_path / "run" / "base") and moved.quant == config.base.quant
    assert find_solved_base(parse(tmp_path, **INT), tmp_path / "run") is None


def test_configuration_of_a_quantization(tmp_path: Path) -> None:
    config = parse(tmp_path, **GPTQ)
    run = resolve_quantization(config).run
    assert isinstance(run.adapter, NoAdapterConfig) and not run.engine.activation_checkpointing
    assert (run.data.packing, run.data.too_long) == (False, "truncate")
    assert run.data.train == config.data.train and run.base == config.base


def test_tasks_keep_the_resolved_base(tmp_path: Path) -> None:
    base = packed.save_gptq(packed.save_plain(tmp_path / "plain"), tmp_path / "gptq")
    tree = parse(tmp_path, base).model_dump(mode="json", exclude={"base": {"quant"}})
    names = ("a", "b")
    tree["data"]["train"] = [str(save_records(tmp_path / f"{name}.jsonl")) for name in names]
    tree["data"]["eval"] = []
    tree["train"]["tasks"] = "separate"
    resolved = resolve_config(parse_config(tree))
    tasks = resolved.split_tasks()
    assert list(tasks) == list(names)
    for name, task in tasks.items():
        assert task.run.base == resolved.run.base and task.directory == resolved.directory
        assert task.run.save.dir == str(tmp_path / "run" / "tasks" / name)
        assert [source.task_name for source in task.run.data.train] == [name]


def test_files_that_are_no_base(tmp_path: Path) -> None:
    config = parse(tmp_path)
    file = tmp_path / "base" / "config.json"
    described = json.loads(file.read_text())
    file.unlink()
    with pytest.raises(UserError, match=r"has no config\.json; base\.path must be a Hugging Face"):
        resolve_config(config)
    file.write_text(json.dumps({**described, "quantization_config": {"quant_method": "new"}}))
    with pytest.raises(UserError, match="quant_method 'new'; read are dist_peft, gptq"):
        resolve_config(config)
