import contextlib
import io
import logging
from pathlib import Path
from typing import Any

import pytest

from dist_peft.app.commands import train as train_app
from dist_peft.app.unused_options import find_unused_options, warn_unused_options
from dist_peft.core.config.io import parse_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.model.skeleton import build_skeleton
from tests.support.dist import run_ranks
from tests.support.tiny_runs import tiny_tree


def config(**sections: dict[str, Any]) -> RunConfig:
    tree: dict[str, Any] = {"base": {"path": "org/name"}, "data": {"train": ["a.jsonl"]}}
    return parse_config({**tree, **{k: {**tree.get(k, {}), **v} for k, v in sections.items()}})


def idle(
    kind: str = "fsdp2", widest: int = 128, device: str = "cuda", **sections: Any
) -> list[str]:
    return list(find_unused_options(config(**sections), kind, widest, device))


@pytest.mark.parametrize("engine", ["single", "fsdp2", "zero"])
def test_defaults_are_silent(engine: str) -> None:
    assert idle(engine) == []


def test_options_of_experts() -> None:
    (text,) = idle("single", engine={"gather_experts": "routed"})
    assert "this run's engine is single" in text
    assert idle(engine={"gather_experts": "routed"}) == []
    (text,) = idle(engine={"gather_experts": "routed", "shard_base": False})
    assert "gather_experts routed has no effect: engine.shard_base is false" in text
    (text,) = idle(adapter={"kind": "lora", "router_aux_loss": 0.1})
    assert "router_aux_loss 0.1 has no effect: adapter.train_router is false" in text
    assert idle(adapter={"kind": "lora", "router_aux_loss": 0.1, "train_router": True}) == []


ENGINE: dict[str, Any] = {
    "stage": 2,
    "deepspeed_config": "ds.json",
    "shard_base": False,
    "shard_group": 2,
    "cpu_offload": "params",
}


@pytest.mark.parametrize(
    ("engine", "ignored"),
    [
        ("single", {"stage", "deepspeed_config", "shard_base", "shard_group", "cpu_offload"}),
        ("fsdp2", {"stage", "deepspeed_config"}),
        ("zero", set()),
    ],
)
def test_options_of_other_engines(engine: str, ignored: set[str]) -> None:
    for name, value in ENGINE.items():
        found = idle(engine, engine={name: value})
        expected = [f"engine.{name} {value} has no effect: this run's engine is {engine}"]
        assert found == (expected if name in ignored else [])


def test_offload_on_the_cpu() -> None:
    (text,) = idle(device="cpu", engine={"cpu_offload": "params"})
    assert text.startswith("engine.cpu_offload params has no effect: the run computes on the CPU")
    assert len(idle("zero", device="cpu", engine={"cpu_offload": "optimizer"})) == 1
    assert len(idle("single", device="cpu", engine={"cpu_offload": "params"})) == 1  # not twice


def test_options_of_recomputation() -> None:
    both = {"keep_results": "products", "offload_inputs": True}
    assert idle("single", engine=both) == []
    (text,) = idle("single", device="cpu", engine=both)
    assert text.startswith("engine.offload_inputs has no effect: the run computes on the CPU")
    found = idle("single", engine={"activation_checkpointing": False, **both})
    assert [text.partition(":")[0] for text in found] == [
        "engine.keep_results products has no effect",
        "engine.offload_inputs has no effect",
    ]


def test_shard_group_without_sharded_base() -> None:
    both = {"shard_base": False, "shard_group": 2}
    (text,) = idle("zero", engine=both)
    assert text.startswith("engine.shard_group 2 has no effect: engine.shard_base is false")
    assert idle("fsdp2", engine=both) == []  # there it shards the adapters


def test_quantization_of_a_base_that_learns_whole() -> None:
    full = {"kind": "full"}
    assert idle(widest=0, adapter=full) == []  # it is the default
    (text,) = idle(widest=0, adapter=full, base={"quant": {"kind": "nf4", "group_size": 128}})
    assert text.startswith("base.quant has no effect: adapter.kind full trains every linear")
    assert idle(widest=0, adapter=full, base={"quant": None}) == []
    assert idle(adapter={"kind": "partial", "last_blocks": 1}, base={"quant": {}}) == []


def test_stage_after_the_end() -> None:
    stages = [{"step": 4, "last_blocks": 1}, {"step": 5, "parts": ["all"]}]
    adapter = {"kind": "partial", "parts": ["head"], "unfreeze": stages}
    (text,) = idle(adapter=adapter, train={"steps": 5})
    assert text.startswith("adapter.unfreeze has a stage at step 5, which has no effect")
    assert idle(adapter=adapter, train={"steps": None, "epochs": 1}) == []


def test_micro_batch_above_the_global_batch() -> None:
    (text,) = idle(train={"global_batch": 5, "micro_batch": 6})
    assert text == (
        "train.micro_batch 6 has no effect beyond 5, the sequences of train.global_batch"
    )
    assert idle(train={"global_batch": 5, "micro_batch": 5}) == []


def test_other_train_options() -> None:
    (text,) = idle(train={"schedule": "constant", "min_lr_ratio": 0.1})
    assert text == "train.min_lr_ratio 0.1 has no effect: train.schedule is constant"
    assert idle(train={"min_lr_ratio": 0.1}) == []
    (text,) = idle(train={"eval_every": 5})
    assert text == "train.eval_every 5 has no effect: data.eval names no source"
    assert idle(train={"eval_every": 5}, data={"eval": ["b.jsonl"]}) == []


def test_adapter_options() -> None:
    (text,) = idle(adapter={"init_iterations": 8})
    assert text.startswith("adapter.init_iterations 8 has no effect with adapter.init default")
    assert idle(adapter={"init_iterations": 8, "init": "pissa"}) == []
    assert idle(adapter={"kind": "none"}) == []


def test_revision_of_a_directory(tmp_path: Path) -> None:
    (text,) = idle(base={"path": str(tmp_path), "revision": "main"})
    assert text.startswith("base.revision main has no effect: base.path ")
    assert idle(base={"revision": "main"}) == []


def test_quantization_options() -> None:
    (text,) = idle(base={"quant": {"kind": "int", "double_quant": False}})
    assert text == "base.quant.double_quant has no effect: it is for kind nf4"
    assert idle(base={"quant": {"kind": "nf4", "double_quant": False}}) == []
    (text,) = idle(base={"quant": {"kind": "int", "calibration_samples": 16}})
    assert text == "base.quant.calibration_samples has no effect: it is for solver gptq"
    gptq = {"kind": "int", "solver": "gptq", "calibration_samples": 16}
    assert idle(base={"quant": gptq}) == []
    (text,) = idle(widest=128, base={"quant": {"group_size": 256}})
    assert text == (
        "base.quant.group_size 256 is more than the largest in_features, 128: each row is one "
        "group, padded with zeros to 256 weights; set it to at most 128"
    )
    assert idle(widest=128, base={"quant": {"group_size": 128}}) == []
    assert idle(widest=0, base={"quant": {"group_size": 256}}) == []


def test_widest_linear_is_of_the_blocks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = parse_config(tiny_tree(tmp_path, base__quant={"group_size": 4096}))
    skeleton = build_skeleton(found.base, tmp_path / "base")
    with caplog.at_level(logging.WARNING, "dist_peft"):
        warn_unused_options(found, World(), skeleton.model, "cpu")
    widest = skeleton.model_config.intermediate_size
    assert f"group_size 4096 is more than the largest in_features, {widest}:" in caplog.text


def test_engine_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    found = parse_config(tiny_tree(tmp_path, engine={"kind": "fsdp2"}))
    skeleton = build_skeleton(found.base, tmp_path / "base")
    with pytest.raises(UserError, match=r"engine\.kind is fsdp2 but there is one process"):
        warn_unused_options(found, World(), skeleton.model, "cpu")


@pytest.mark.dist
def test_a_job_says_it_once(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path, train__micro_batch=4, train__steps=1)
    said = run_ranks(train_job, 2, tree)
    words = "train.micro_batch 4 has no effect beyond 2"
    assert (tmp_path / "run" / "log.txt").read_text().count(words) == 1
    assert [text.count(words) for text in said] == [1, 0]


def train_job(world: World, tree: dict[str, Any]) -> str:
    """What the rank says on its standard error."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert train_app.train_from_config(parse_config(tree), world) == 0
        close_log()
    return said.getvalue()
