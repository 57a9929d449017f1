"""A plan against real runs: rows and resting bytes exactly, live storage within 5 %."""

from pathlib import Path
from typing import Any

import pytest

from dist_peft.core.config.engine import EngineConfig
from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.engine import activation_checkpointing
from dist_peft.engine.input_offload import InputOffload, PlainCopies
from dist_peft.plan.cluster import GPUS, Cluster
from dist_peft.plan.planned_model import build_planned_model
from dist_peft.plan.run_plan import RunPlan, choose_traced_blocks, plan_run
from tests.support.dist import run_ranks
from tests.support.live_storage import (
    ODD,
    measure_steps,
    odd_classifier_tree,
    odd_tree,
    save_odd_base,
    save_odd_bert,
)

SAMPLED = {"scheduled_sampling": {"c": 0, "k": 0, "temperature": 1}}

PACKED_ENDS = {"quant": {"kind": "nf4", "group_size": 64, "embeddings": True}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_odd_base(tmp_path_factory.mktemp("plan") / "base")


def plan_tree(tree: dict[str, Any], ranks: int) -> RunPlan:
    planned = build_planned_model(parse_config(tree))
    return plan_run(planned, Cluster(1, ranks, 2**34, GPUS["h100"]), device_type="cpu")


def assert_plan_holds(
    plan: RunPlan, measured: list[dict[str, int]], name: str, repeated: float = 0
) -> None:
    """``repeated``: share of the planned bytes that tokens of the same number may save, of which
    the plan gathers each one's row of the embedding."""
    assert plan.own_rows == tuple(rank["rows"] for rank in measured)
    assert plan.resting.device_total == measured[0]["resting"]
    assert_peak_holds(plan, measured[0], name)
    spare = plan.traffic.gathered - measured[0]["gathered"]
    assert 0 <= spare <= repeated * plan.traffic.gathered


def assert_peak_holds(plan: RunPlan, measured: dict[str, int], name: str) -> None:
    expected = plan.resting.device_total + max(p.total for p in plan.memory.phases)
    error = expected / measured["peak"] - 1
    print(f"{name}: peak {measured['peak']} measured, planned {error:+.2%}")
    assert abs(error) < 0.05


@pytest.mark.e2e
def test_one_process(base: Path) -> None:
    tree = odd_tree(base, train={"global_batch": 4, "optimizer": "adamw8bit"}, base=PACKED_ENDS)
    assert_plan_holds(plan_tree(tree, 1), [measure_steps(World(), {"a": tree})["a"]], "single")


@pytest.mark.e2e
def test_kept_results_and_inputs_in_host_memory(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real run copies to host memory as a GPU's would, within one memory."""

    def copy_within_memory(config: EngineConfig, device: object) -> InputOffload | None:
        return InputOffload(PlainCopies()) if config.offload_inputs else None

    monkeypatch.setattr(activation_checkpointing, "make_input_offload", copy_within_memory)
    plans = {}
    for kept, offloads in (("none", False), ("products", False), ("none", True)):
        engine = {"keep_results": kept, "offload_inputs": offloads}
        name, tree = f"{kept} {offloads}", odd_tree(base, engine=engine)
        plans[name] = plan_tree(tree, 1)
        if name != "none False":  # which the other tests measure
            assert_plan_holds(plans[name], [measure_steps(World(), {"a": tree})["a"]], name)
    inputs = 4 * 2 * 96 * ODD.hidden_size * 2
    assert [plan.host.block_inputs for plan in plans.values()] == [0, 0, inputs]
    plain, products, _ = plans.values()
    assert plain.duration is not None and products.duration is not None
    assert products.duration.flops < plain.duration.flops
    peaks = [
        sum(
            phase.items.get("block inputs", 0)
            for phase in plan.memory.phases
            if phase.phase == "head"
        )
        for plan in plans.values()
    ]
    # of the inputs of four blocks, the first is the embedding's; the last may be on its way
    assert peaks[1] > peaks[0] and peaks[0] - peaks[2] >= inputs // 2


@pytest.mark.e2e
def test_shared_decodes_are_counted(base: Path) -> None:
    """A block's decoded weights at once, but for the last one; the real run keeps the plan."""
    trees = {shared: odd_tree(base, engine={"share_decodes": shared}) for shared in (False, True)}
    plans = {shared: plan_tree(tree, 1) for shared, tree in trees.items()}
    assert_plan_holds(plans[True], [measure_steps(World(), {"a": trees[True]})["a"]], "shared")
    peaks = {
        shared: max(
            phase.items.get("dequantized weight", 0)
            for phase in plan.memory.phases
            if phase.phase.startswith("backward")
        )
        for shared, plan in plans.items()
    }
    width, inner, key_value = ODD.hidden_size, ODD.intermediate_size, 2 * 20
    weights = 2 * width * width + 2 * width * key_value + 3 * width * inner
    assert 2 * (weights - width * inner) <= peaks[True] <= 2 * weights
    assert peaks[False] < peaks[True]
    plain, shared = plans[False].duration, plans[True].duration
    assert plain is not None and shared is not None
    assert shared.dequantizing == pytest.approx(plain.dequantizing * 2 / 3)


@pytest.mark.dist
def test_classifiers_on_two_ranks(base: Path, tmp_path: Path) -> None:
    bert = save_odd_bert(tmp_path / "bert")
    trees = {"decoder": odd_classifier_tree(base), "encoder": odd_classifier_tree(bert)}
    measured = run_ranks(measure_steps, 2, trees)
    for name, tree in trees.items():
        assert_plan_holds(plan_tree(tree, 2), [rank[name] for rank in measured], name)


@pytest.mark.dist
def test_three_ranks(base: Path) -> None:
    trees = {
        "checkpointing": odd_tree(base),
        "all activations, packed ends": odd_tree(
            base, engine={"activation_checkpointing": False}, base=PACKED_ENDS
        ),
        "three of four blocks kept, a pass more": odd_tree(
            base, engine={"keep_gathered": 3}, train=SAMPLED
        ),
    }
    measured = run_ranks(measure_steps, 3, trees)
    for name, tree in trees.items():
        repeated = 0.05 if "a pass more" in name else 0  # sampled tokens
        assert_plan_holds(plan_tree(tree, 3), [rank[name] for rank in measured], name, repeated)


@pytest.mark.dist
def test_two_ranks_of_zero(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    file = tmp_path / "deepspeed.json"  # the usual bucket of 191 MiB would hide all else
    file.write_text('{"zero_optimization": {"reduce_bucket_size": 20000}}')
    trees = {}
    for stage in (2, 3):
        engine = {"kind": "zero", "stage": stage, "deepspeed_config": str(file)}
        trees[f"zero {stage}"] = odd_tree(
            base, engine=engine, train={"global_batch": 8}, base=PACKED_ENDS if stage == 3 else {}
        )
    measured = run_ranks(measure_steps, 2, trees)[0]
    for name, tree in trees.items():
        plan = plan_tree(tree, 2)
        assert_peak_holds(plan, measured[name], name)
        # stages 1 and 2 gather adapters once a step, which is half of it for a micro-batch
        adapters = 0 if name == "zero 3" else 2 * plan.resting.trainable
        assert measured[name]["gathered"] == plan.traffic.gathered + adapters


def test_more_ranks_than_sequences_are_refused(base: Path) -> None:
    planned = build_planned_model(parse_config(odd_tree(base)))
    with pytest.raises(UserError, match="global_batch is 12 sequences for 16 ranks"):
        plan_run(planned, Cluster(2, 8, 2**34))


def test_two_blocks_of_the_largest_kind_are_traced(base: Path) -> None:
    blocks = build_planned_model(parse_config(odd_tree(base))).skeleton.blocks
    assert choose_traced_blocks(blocks) == [0, 1]
    assert choose_traced_blocks(blocks[:1]) == [0]


@pytest.mark.e2e
def test_blocks_without_a_backward_pass(tmp_path: Path) -> None:
    """Nothing below the first trained parameter has one."""
    tree = odd_classifier_tree(save_odd_bert(tmp_path / "bert"))
    tree["adapter"] = {"kind": "partial", "parts": ["head"]}
    plan = plan_tree(tree, 1)
    phases = {phase.phase for phase in plan.memory.phases}
    assert phases == {"embedding", "forward", "head", "step"}
    assert_plan_holds(plan, [measure_steps(World(), {"a": tree})["a"]], "head alone")
