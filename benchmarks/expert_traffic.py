"""Bytes that a rank gathers in a micro-batch of large mixtures: all experts, or the routed ones, or
none, as tokens travel to them.

    python benchmarks/expert_traffic.py [--choices all routed tokens]

As ``fake_world.py``: full-width models over sparse files, one rank of a process group that sends
nothing, the project's own engine and a step traced on fake tensors. LoRA is on attention. Experts
are routed to as an even router would on average; a real router is less even. Choices
that are not asked for are those of the committed result.
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
    ("mixtral-8x22b", 8, 8),
    ("mixtral-8x22b", 8, 2048),
    ("deepseek-v3-fp8", 2, 8),
    ("deepseek-v3-fp8", 8, 8),
    ("deepseek-v3-fp8", 8, 32),
    ("deepseek-v3-fp8", 8, 2048),
    ("deepseek-v3-fp8", 64, 2048),
)
"""Model, ranks, tokens of a rank in a micro-batch."""

CHOICES = ("all", "routed", "tokens")
"""Of ``engine.gather_experts``."""

TARGETS = {
    "mixtral-8x22b": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "deepseek-v3-fp8": ["q_a_proj", "q_b_proj", "o_proj"],
}


def count_bytes(base: str, ranks: int, tokens: int, choice: str) -> dict[str, int]:
    """Return gathered bytes of a micro-batch, and what a card needs."""
    file = BASES / f"{base}.json"
    config = run_config(
        Path("not/downloaded"),
        adapter={"target_modules": TARGETS[base]},
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
    return {"gathered": plan.traffic.gathered, "needed": plan.memory.total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=CHOICES)
    args = parser.parse_args()
    file = RESULTS / "expert_traffic.json"
    earlier = json.loads(file.read_text())["result"] if file.exists() else []
    known = {(case["base"], case["ranks"], case["tokens"]): case for case in earlier}
    rows, result = [], []
    for base, ranks, tokens in CASES:
        found: dict[str, Any] = {"base": base, "ranks": ranks, "tokens": tokens}
        before = known.get((base, ranks, tokens), {})
        for choice in CHOICES:
            is_known = choice in before and choice not in args.choices
            found[choice] = before[choice] if is_known else count_bytes(base, ranks, tokens, choice)
        result.append(found)
        kinds = [found[choice] for choice in CHOICES]
        sizes = [kind["gathered"] / 1e9 for kind in kinds]
        cards = [kind["needed"] / 2**30 for kind in kinds]
        share = f"{sizes[2] / sizes[0]:.3f}"
        rows.append([base, ranks, tokens, *sizes, share, *cards])
        print(f"{base}@{ranks}, {tokens} tokens: {share}", flush=True)
    header = ("model", "ranks", "tokens a rank", "all GB", "routed GB", "tokens GB", "share")
    print_table([*header, "card GiB, all", "routed", "tokens"], rows)
    write_result("expert_traffic", result)


if __name__ == "__main__":
    main()
