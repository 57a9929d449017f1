"""Bytes that a rank gathers in a micro-batch of large mixtures: all experts, or the routed ones, or
none, as tokens travel to them.

    python benchmarks/expert_traffic.py [--choices all routed tokens] [--lora attention experts]
        [--bases mixtral-8x22b deepseek-v3-fp8]

As ``fake_world.py``: full-width models over sparse files, one rank of a process group that sends
nothing, the project's own engine and a step traced on fake tensors. LoRA of rank 16 is on
attention, or on the experts too. Experts are routed to as an even router would on average; a real
router is less even. What is not asked for is as in the committed result.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, print_table, run_config, write_result
from fake_world import BASES

from dist_peft.core.config.run import BaseConfig
from dist_peft.plan.cluster import Cluster
from dist_peft.plan.planned_model import build_planned_model
from dist_peft.plan.run_plan import plan_run

CASES = (
    ("mixtral-8x22b", 8, 8, "attention"),
    ("mixtral-8x22b", 8, 2048, "attention"),
    ("deepseek-v3-fp8", 2, 8, "attention"),
    ("deepseek-v3-fp8", 8, 8, "attention"),
    ("deepseek-v3-fp8", 8, 32, "attention"),
    ("deepseek-v3-fp8", 8, 2048, "attention"),
    ("deepseek-v3-fp8", 64, 2048, "attention"),
    ("mixtral-8x22b", 8, 2048, "experts"),
    ("deepseek-v3-fp8", 8, 2048, "experts"),
    ("deepseek-v3-fp8", 64, 2048, "experts"),
)
"""Model, ranks, tokens of a rank in a micro-batch, and where LoRA is."""

CHOICES = ("all", "routed", "tokens")
"""Of ``engine.gather_experts``."""

PLACES = ("attention", "experts")
"""Of LoRA: attention alone, or with the experts."""

TARGETS = {
    "mixtral-8x22b": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "deepseek-v3-fp8": ["q_a_proj", "q_b_proj", "o_proj"],
}


def count_bytes(base: str, ranks: int, tokens: int, lora: str, choice: str) -> dict[str, int]:
    """Return gathered bytes of a micro-batch, gradients that are reduced, and what a card needs."""
    file = BASES / f"{base}.json"
    targets = TARGETS[base] + (["experts"] if lora == "experts" else [])
    config = run_config(
        Path("not/downloaded"),
        adapter={"target_modules": targets},
        data={"train": ["unused.jsonl"], "seq_len": tokens, "packing": True},
        train={"global_batch": ranks},
        engine={"gather_experts": choice},
    )
    if "quantization_config" in file.read_text():  # decides the codec
        config = config.model_copy(update={"base": BaseConfig(path=config.base.path)})
    cards = min(8, ranks)
    with tempfile.TemporaryDirectory() as scratch:
        planned = build_planned_model(config, file, Path(scratch))
        plan = plan_run(planned, Cluster(ranks // cards, cards, 80 * 2**30))
    found = {"gathered": plan.traffic.gathered, "reduced": plan.traffic.reduced}
    return {**found, "needed": plan.memory.total}


def _show(found: dict[str, Any], choice: str, measure: str, unit: float) -> float | str:
    value = found.get(choice, {}).get(measure)
    return "-" if value is None else value / unit


def _name_case(case: dict[str, Any]) -> tuple[str, int, int, str]:
    return case["base"], case["ranks"], case["tokens_a_rank"], case.get("lora", "attention")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=CHOICES)
    parser.add_argument("--lora", nargs="+", choices=PLACES, default=PLACES)
    parser.add_argument("--bases", nargs="+", choices=TARGETS, default=list(TARGETS))
    args = parser.parse_args()
    file = RESULTS / "expert_traffic.json"
    earlier = json.loads(file.read_text())["result"] if file.exists() else []
    known = {_name_case(case): case for case in earlier}
    rows, result = [], []
    for base, ranks, tokens, lora in CASES:
        found: dict[str, Any] = {"base": base, "ranks": ranks, "lora": lora}
        found["tokens_a_rank"] = tokens
        before = known.get(_name_case(found), {})
        for choice in CHOICES:
            if choice in args.choices and lora in args.lora and base in args.bases:
                found[choice] = count_bytes(base, ranks, tokens, lora, choice)
            elif choice in before:
                found[choice] = before[choice]
        result.append(found)
        if not {"all", "tokens"} <= found.keys():
            continue
        sizes = [_show(found, choice, "gathered", 1e9) for choice in CHOICES]
        reduced = [_show(found, choice, "reduced", 1e9) for choice in CHOICES]
        cards = [_show(found, choice, "needed", 2**30) for choice in CHOICES]
        share = f"{found['tokens']['gathered'] / found['all']['gathered']:.3f}"
        rows.append([base, ranks, tokens, lora, *sizes, share, *reduced, *cards])
        print(f"{base}@{ranks}, {tokens} tokens, {lora}: {share}", flush=True)
    header = (
        "model",
        "ranks",
        "tokens a rank",
        "LoRA",
        "all GB",
        "routed GB",
        "tokens GB",
        "share",
    )
    reduced_header = ("reduced GB, all", "routed", "tokens")
    print_table([*header, *reduced_header, "card GiB, all", "routed", "tokens"], rows)
    write_result("expert_traffic", result)


if __name__ == "__main__":
    main()
