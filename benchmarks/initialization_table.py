"""Initializations of LoRA: held-out loss after a few steps, and what the start costs.

    python benchmarks/initialization_table.py --base DIR --text FILE [--seeds 0 1 2]

LoRA on all linears of a pretrained base in float32, trained on the first four fifths of the first
``--lines`` of FILE and evaluated on the last. All initializations have the same data, order, rank,
learning rate and number of steps. A seed sets the order of the data and the random numbers of the
start. CPU seconds are those of loading the base and initializing, beyond the same with ``default``,
medians over the seeds.
"""

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import print_table, write_result
from prune_table import split_text

from dist_peft.app.commands.train import train_from_config
from dist_peft.app.data_initialization import initialize_from_data
from dist_peft.app.data_setup import make_data_loaders
from dist_peft.app.model_setup import build_model, load_weights
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.train.step_metrics import METRICS_FILE, read_metrics

INITS: dict[str, dict[str, Any]] = {
    "default": {},
    "pissa": {"init": "pissa"},
    "eva": {"init": "eva"},
    "eva, rho 2": {"init": "eva", "init_rho": 2.0},
    "lora_ga": {"init": "lora_ga"},
}


@dataclass(frozen=True)
class Measured:
    """Mean and standard deviation over the seeds of the held-out loss at each evaluated step."""

    init: str
    lr: float
    steps: list[int]
    losses: list[float]
    deviations: list[float]


def make_tree(args: argparse.Namespace, scratch: Path, init: str, seed: int) -> dict[str, Any]:
    names = {"train": "calibration", "eval": "held_out"}
    sources = {
        key: [{"path": str(scratch / f"{name}{args.text.suffix}"), "format": "text"}]
        for key, name in names.items()
    }
    return {
        "base": {"path": str(args.base), "quant": None, "compute_dtype": "float32"},
        "adapter": {
            "kind": "lora",
            "r": args.rank,
            "alpha": 2 * args.rank,
            **INITS[init],
        },
        "data": {**sources, "seq_len": args.tokens, "cache_dir": str(scratch / "cache")},
        "train": {
            "steps": args.steps,
            "eval_every": args.every,
            "global_batch": 8,
            "micro_batch": 8,
            "schedule": "constant",
            "warmup": 0,
            "seed": seed,
            "device": "cpu",
        },
    }


def train_one(args: argparse.Namespace, scratch: Path, init: str, lr: float, seed: int) -> Any:
    """Held-out losses by step, the untrained one first."""
    tree = make_tree(args, scratch, init, seed)
    run = scratch / f"{init}-{lr}-{seed}".replace(", ", "-").replace(" ", "")
    tree["train"]["lr"] = lr
    tree["save"] = {"dir": str(run), "every": 0}
    assert train_from_config(parse_config(tree), World()) == 0
    close_log()
    records = read_metrics(run / METRICS_FILE)
    found = {0: records[0].eval_loss_before}
    return found | {r.step: r.eval_loss for r in records if r.eval_loss is not None}


def measure_start(args: argparse.Namespace, scratch: Path, init: str, seed: int) -> float:
    """Processor seconds of loading the base and initializing the adapter."""
    config = parse_config(make_tree(args, scratch, init, seed))
    world, device = World(), torch.device("cpu")
    setup = build_model(resolve_config(config))
    loaders = make_data_loaders(config, setup.tokenizer, world)
    begin = time.process_time()
    initialize_from_data(load_weights(setup, world, device), loaders, world)
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="a pretrained model's directory")
    parser.add_argument("--text", type=Path, required=True, help="JSONL with text, or plain text")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lrs", nargs="+", type=float, default=[5e-3])
    parser.add_argument("--lines", type=int, default=2500, help="of the text")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=15, help="steps between evaluations")
    parser.add_argument("--tokens", type=int, default=128, help="of a packed sequence")
    args = parser.parse_args()
    torch.set_num_threads(1)
    before = os.times()
    measured: list[Measured] = []
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        cut = scratch / f"text{args.text.suffix}"
        cut.write_text("".join(args.text.read_text().splitlines(keepends=True)[: args.lines]))
        split_text(cut, scratch)
        starts: dict[str, list[float]] = {init: [] for init in INITS}
        measure_start(args, scratch, "default", args.seeds[0])  # tokens are cached from here on
        for seed in args.seeds:
            for init in INITS:
                starts[init].append(measure_start(args, scratch, init, seed))
        seconds = {init: statistics.median(found) for init, found in starts.items()}
        for lr in args.lrs:
            for init in INITS:
                runs = [train_one(args, scratch, init, lr, seed) for seed in args.seeds]
                steps = sorted(runs[0])
                columns = [[run[step] for run in runs] for step in steps]
                means = [statistics.mean(column) for column in columns]
                deviations = [statistics.stdev(column) for column in columns]
                measured.append(Measured(init, lr, steps, means, deviations))
    rows = [
        [
            f"{m.lr:g}",
            m.init,
            *(f"{x:.4f} ± {d:.4f}" for x, d in zip(m.losses[1:], m.deviations[1:], strict=True)),
            f"{seconds[m.init] - seconds['default']:.2f}",
        ]
        for m in measured
    ]
    heads = [f"after {step}" for step in measured[0].steps[1:]]
    print(f"held-out loss of the base: {measured[0].losses[0]:.4f}")
    print_table(["lr", "init", *heads, "CPU s"], rows)
    after = os.times()
    print(f"{after.user + after.system - before.user - before.system:.0f} CPU seconds in all")
    about = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    write_result(
        f"initialization_{args.base.name}",
        {"options": about, "rows": measured, "start_cpu_seconds": seconds},
    )


if __name__ == "__main__":
    main()
