"""Experts that stay on their ranks, with everything that runs combine with them: replicas, packing,
accumulation, kept results, shared decodes, more ranks than experts, evaluations, a resume, merges.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_peft.app.verified_export import merge_finished_run
from dist_peft.core.config.io import parse_config
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.plan.cluster import Cluster
from dist_peft.plan.planned_model import build_planned_model
from dist_peft.plan.run_plan import plan_run
from dist_peft.train.step_metrics import read_metrics
from tests.support.dist import run_ranks
from tests.support.equality import Outcome, all_cases, assert_same
from tests.support.live_storage import measure_steps, odd_tree
from tests.support.story_runs import NF4, train
from tests.support.tiny_models import MIXTURES, save_model
from tests.support.tiny_runs import save_records, tiny_tree

pytestmark = [pytest.mark.dist, pytest.mark.e2e]

RANKS = 4
CASES: dict[str, dict[str, Any]] = {
    "replicas": {
        "family": "mixtral",
        "engine": {"shard_group": 2, "reduce_gradients": "step", "share_decodes": True},
        "data__packing": True,
        "adapter__dropout": 0.1,
    },
    "more ranks than experts": {
        "family": "qwen3_moe",
        "engine": {"keep_results": "products"},
        "train__global_batch": 6,  # two ranks have a micro-batch of padding
    },
}
"""Four ranks of fsdp2; two micro-batches of each in a step."""


def tree(directory: Path, family: str, **changes: Any) -> dict[str, Any]:
    settings = {
        "base__quant": NF4,
        "adapter__target_modules": "all-linear",
        "data__seq_len": 32,
        "train__global_batch": 2 * RANKS,
        "train__steps": 2,
        **changes,
    }
    base = directory / family
    whole = tiny_tree(directory, **settings)
    if not base.is_dir():
        (directory / "base").rename(base)
        (base / "model.safetensors").unlink()
        save_model(MIXTURES[family], base)
    whole["base"]["path"] = str(base)
    whole["data"]["train"] = [str(save_records(directory / "twelve.jsonl", 12))]
    return whole


def run_all(
    world: World,
    trees: dict[str, dict[str, Any]],
    evaluated: dict[str, Any],
    measured: dict[str, Any],
) -> tuple[dict[str, Outcome], int, dict[str, dict[str, int]]]:
    """Everything in one set of processes."""
    code = train(world, evaluated)
    sizes = measure_steps(world, {"measured": measured})
    return all_cases(world, trees), code, sizes


def test_what_is_combined_with_travelling_tokens(tmp_path: Path) -> None:
    """Losses and gradients of one process; a run that one process began, with evaluations in which
    one rank has no sequence; its merge; and bytes at rest as planned."""
    singles = {}
    for name, case in CASES.items():
        changes = {key: value for key, value in case.items() if key not in ("family", "engine")}
        singles[name] = tree(tmp_path, case["family"], **changes)
    engines = {name: {"gather_experts": "tokens", **case["engine"]} for name, case in CASES.items()}
    trees = {name: {**own, "engine": engines[name]} for name, own in singles.items()}
    every = {"train__eval_every": 1, "train__steps": 3, "save__every": 0}
    evaluated = tree(tmp_path, "qwen2_moe", train__lr=0.1, **every)
    save = {"dir": str(tmp_path / "ranks"), "every": 0}
    travelled = {**evaluated, "engine": {"gather_experts": "tokens"}, "save": save}
    measured = odd_tree(
        Path(singles["more ranks than experts"]["base"]["path"]),
        adapter={"target_modules": "all-linear"},
        engine={"gather_experts": "tokens"},
        train={"global_batch": 2 * RANKS},
    )
    assert train(World(), {**evaluated, "save": save}, 1) == 75
    results = run_ranks(run_all, RANKS, trees, travelled, measured, timeout=600)
    expected = all_cases(World(), singles)
    for outcomes, code, _ in results:
        assert code == 0
        for name, outcome in outcomes.items():
            print(name)
            assert_same(outcome, expected[name])
    planned = build_planned_model(parse_config(measured))
    plan = plan_run(planned, Cluster(1, RANKS, 2**34), device_type="cpu")
    sizes = [own["measured"] for *_, own in results]
    assert plan.own_rows == tuple(own["rows"] for own in sizes)
    assert plan.resting.device_total == sizes[0]["resting"]
    check_evaluations_and_merge(tmp_path, evaluated)


def check_evaluations_and_merge(directory: Path, evaluated: dict[str, Any]) -> None:
    """Of the run that four ranks resumed, against one process; three held-out sequences."""
    assert train(World(), evaluated) == 0
    close_log()
    alone, ranks = (
        torch.tensor([[record.loss, record.eval_loss] for record in read_metrics(file)])
        for file in (directory / name / "metrics.jsonl" for name in ("run", "ranks"))
    )
    assert len(alone) == 3 and alone.isfinite().all()
    torch.testing.assert_close(ranks, alone, rtol=2e-6, atol=0)
    merge_finished_run(directory / "ranks", directory / "merged", into="decoded")
    assert (directory / "merged" / "config.json").is_file()
