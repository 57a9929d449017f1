from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dist_peft.core.config.io import parse_config
from dist_peft.plan import search
from dist_peft.plan.cluster import GPUS, Cluster, FixedShares
from dist_peft.plan.memory import PhasePeak, build_memory_plan
from dist_peft.plan.planned_model import PlannedModel, build_planned_model
from dist_peft.plan.resting import count_resting_bytes
from dist_peft.plan.run_plan import RunPlan
from dist_peft.plan.search import Proposal, format_proposals, search_plans
from tests.support.live_storage import odd_tree, save_odd_base
from tests.support.tiny_models import MIXTURES, save_model


def test_changes_are_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "plan_run", plan_without_a_trace)
    tree = odd_tree(
        save_odd_base(tmp_path / "base"),
        data={"seq_len": 16},
        train={"micro_batch": 1, "global_batch": 8},
        engine={"activation_checkpointing": False},
    )
    planned = build_planned_model(parse_config(tree))
    found = {p.change: p for p in search_plans(planned, Cluster(2, 2, 2**40, GPUS["h100"]))}
    assert list(found) == [
        "train.micro_batch=2",
        "engine.shard_group=node",
        "engine.keep_gathered=3",
        "engine.cpu_offload=params",
        "--gpus-per-node 1",
        "base.quant={kind: int, bits: 4, solver: hqq}",
        "base.quant={kind: int, bits: 3, solver: hqq}",
        "base.quant={kind: int, bits: 2, solver: hqq}",
    ]
    needed = [found[name].needed for name in list(found)[5:]]
    assert needed == sorted(needed, reverse=True) and len(set(needed)) == 3
    assert found["--gpus-per-node 1"].ranks == 2
    assert found["engine.cpu_offload=params"].needed < found["engine.shard_group=node"].needed


def test_results_to_keep_are_proposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "plan_run", plan_without_a_trace)
    tree = odd_tree(save_odd_base(tmp_path / "base"), engine={"keep_results": "attention"})
    monkeypatch.setattr(search, "_propose_bits", lambda *args: [])
    planned = build_planned_model(parse_config(tree))
    found = [p.change for p in search_plans(planned, Cluster(1, 1, 2**40))]
    changes = ["keep_results=products", "share_decodes=true", "offload_inputs=true"]
    assert found[-3:] == [f"engine.{change}" for change in changes]
    tree = odd_tree(tmp_path / "base", engine={"share_decodes": True, "offload_inputs": True})
    planned = build_planned_model(parse_config(tree))
    found = [p.change for p in search_plans(planned, Cluster(1, 1, 2**40))]
    assert found[-1] == "engine.keep_results=attention"


def plan_without_a_trace(planned: PlannedModel, cluster: Cluster) -> RunPlan:
    """Bytes at rest, and 1000 for each sequence of a micro-batch."""
    config, skeleton = planned.config, planned.skeleton
    world = cluster.make_world(config.engine)
    resting = count_resting_bytes(skeleton.model, skeleton.blocks, config, world)
    phases = [PhasePeak("backward", {"activations": 1000 * config.train.micro_batch})]
    memory = build_memory_plan(resting, phases, cluster, FixedShares())
    nothing: Any = None
    return RunPlan("", "", memory, resting, 0, (), nothing, nothing, None, "", 2**38)


def test_table() -> None:
    proposals = [
        Proposal("a", 2, 30 * 2**30, -(2**30), None),
        Proposal("b", 2, 20 * 2**30, 4 * 2**30, None),
        Proposal("c", 2, 10 * 2**30, 14 * 2**30, 1234.5),
    ]
    lines = format_proposals(proposals)[2:]
    assert [line.split()[0] for line in lines] == ["c", "b", "a"]
    assert "1,234 tokens/s" in lines[0] and "does not fit" in lines[2]


@pytest.mark.e2e
def test_ways_of_experts_are_proposed_where_they_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 experts and 16 tokens of two ranks, two each: 40 % of them are gathered; with 4096 tokens,
    all, and rows that travel weigh as much as the experts."""
    config = MIXTURES["qwen3_moe"]
    config.num_experts, config.moe_intermediate_size = 64, 64
    save_model(config, tmp_path / "base")
    monkeypatch.setattr(search, "_propose_bits", lambda *args: [])
    found = {}
    for tokens in (8, 2048):
        tree = odd_tree(
            tmp_path / "base",
            data={"seq_len": tokens},
            train={"micro_batch": 1, "global_batch": 2},
            adapter={"target_modules": ["q_proj"]},
        )
        planned = build_planned_model(parse_config(tree))
        found[tokens] = search._propose_ways_of_experts(planned, Cluster(1, 2, 2**40))
    changes = {n: [p.change.rpartition("=")[2] for p in found[n]] for n in found}
    assert changes == {8: ["routed", "tokens"], 2048: []}
    tried: list[str] = []
    monkeypatch.setattr(search, "plan_run", lambda changed, _: plan_ways(changed, tried))
    for engine, wanted in (("none", ["all", "routed", "tokens"]), ("params", ["all", "routed"])):
        update = {"engine": planned.config.engine.model_copy(update={"cpu_offload": engine})}
        changed = replace(planned, config=planned.config.model_copy(update=update))
        proposed = search._propose_ways_of_experts(changed, Cluster(1, 2, 2**40))
        assert tried == wanted and len(proposed) == len(wanted) - 2
        tried.clear()


def plan_ways(planned: PlannedModel, tried: list[str]) -> Any:
    """Tokens save a tenth of a card's memory and nothing of the bytes; routed experts neither."""
    tried.append(planned.config.engine.gather_experts)
    memory = SimpleNamespace(total=90 if tried[-1] == "tokens" else 100, spare=1)
    return SimpleNamespace(memory=memory, traffic=SimpleNamespace(gathered=100), duration=None)
