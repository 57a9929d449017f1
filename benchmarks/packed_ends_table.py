"""The price in loss of packing the embedding and the output head (``base.quant.embeddings``).

    python benchmarks/packed_ends_table.py --base DIR --text FILE [--seeds 0 1 2]

Held-out loss of a pretrained base before training and after LoRA on all linears, with the blocks
packed and with embedding and head packed too. Trained on the first four fifths of the first
``--lines`` of FILE, evaluated on the last. Data, order, rank, learning rate and number of steps are
the same; a seed sets the order of the data and the start of the adapter. Arithmetic in float32.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import print_table, write_result
from prune_table import split_text

from dist_peft.app.commands.train import train_from_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.train.step_metrics import METRICS_FILE, read_metrics

BASES: dict[str, dict[str, Any] | None] = {
    "float32": None,
    "nf4": {"kind": "nf4"},
    "nf4, embeddings": {"kind": "nf4", "embeddings": True},
    "int8": {"kind": "int", "bits": 8},
    "int8, embeddings": {"kind": "int", "bits": 8, "embeddings": True},
}


def make_tree(args: argparse.Namespace, scratch: Path, base: str, seed: int) -> dict[str, Any]:
    files = {"train": "calibration", "eval": "held_out"}
    sources = {
        key: [{"path": str(scratch / f"{name}{args.text.suffix}"), "format": "text"}]
        for key, name in files.items()
    }
    return {
        "base": {"path": str(args.base), "quant": BASES[base], "compute_dtype": "float32"},
        "adapter": {"kind": "lora", "r": 8, "alpha": 16},
        "data": {**sources, "seq_len": 128, "cache_dir": str(scratch / "cache")},
        "train": {
            "steps": args.steps,
            "eval_every": args.steps,
            "global_batch": 8,
            "micro_batch": 8,
            "schedule": "constant",
            "warmup": 0,
            "lr": args.lr,
            "samples": 0,
            "seed": seed,
            "device": "cpu",
        },
        "save": {"dir": str(scratch / f"{base}-{seed}".replace(", ", "-")), "every": 0},
    }


def train_one(args: argparse.Namespace, scratch: Path, base: str, seed: int) -> tuple[float, float]:
    """Return the held-out loss before training and after it."""
    tree = make_tree(args, scratch, base, seed)
    assert train_from_config(parse_config(tree), World()) == 0
    close_log()
    records = read_metrics(Path(tree["save"]["dir"]) / METRICS_FILE)
    before, after = records[0].eval_loss_before, records[-1].eval_loss
    assert before is not None and after is not None
    return before, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="a pretrained model's directory")
    parser.add_argument("--text", type=Path, required=True, help="JSONL with text, or plain text")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lines", type=int, default=2500, help="of the text")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=5e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        cut = scratch / f"text{args.text.suffix}"
        cut.write_text("".join(args.text.read_text().splitlines(keepends=True)[: args.lines]))
        split_text(cut, scratch)
        for seed in args.seeds:
            for base in BASES:
                found.setdefault(base, []).append(train_one(args, scratch, base, seed))
    rows = []
    for base, losses in found.items():
        after = [pair[1] for pair in losses]
        spread = f" ± {statistics.stdev(after):.4f}" if len(after) > 1 else ""
        rows.append((base, f"{losses[0][0]:.4f}", f"{statistics.mean(after):.4f}{spread}"))
    print_table(("base", "untrained", f"after {args.steps} steps"), rows)
    write_result(
        f"packed_ends_{args.base.name}",
        {"losses": found, "steps": args.steps, "lr": args.lr, "seeds": args.seeds},
    )


if __name__ == "__main__":
    main()
