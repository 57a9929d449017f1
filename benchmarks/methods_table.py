"""Every adapter method on one real task, with one budget: held-out loss, parameters, memory, time.

    python benchmarks/methods_table.py --base stories260K-hf --gsm8k DIR     # run what is missing
    python benchmarks/methods_table.py --write                               # the table of the docs

The task is GSM8K (Cobbe et al. 2021: questions, and solutions in steps) on a small language model
that has never seen it. All methods get the same sequences in the same order, as many steps, and a
learning rate chosen alike: each rate of ``RATES`` once with the first seed, then the one of the
lowest held-out loss with the other seeds. The choice is made on the held-out records themselves,
for every method: losses are comparable, and a little lower than those of a rate chosen elsewhere.

Each cell (method, rate, seed) is a run in a process forked from this one, which has the libraries
loaded, and is written to the result at its end; the next call runs the cells that are missing. A
method is a line of ``METHODS``.

    memory   private pages that a run adds at its peak to those of the libraries
    time     CPU seconds of the whole run: load, steps, evaluation, adapter
"""

import argparse
import json
import multiprocessing as mp
import os
import re
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from dist_peft.app.commands.train import train_from_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.train.step_metrics import read_metrics

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
EDGES = (min(RATES), max(RATES))
SEEDS = (0, 1, 2)
STEPS, BATCH, TOKENS = 30, 2, 320
TRAIN_RECORDS, HELD_OUT = 120, 30
NAME = "methods_table"
MIB = 2**20
RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"

Section = Mapping[str, Any]

NF4 = {"kind": "nf4"}
INT4 = {"kind": "int", "bits": 4, "group_size": 8}
BUT_DOWN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
"""Linears of stories260K whose inputs (64) groups of 8 divide; ``down_proj`` has 172."""


def lora(r: int, **more: Any) -> dict[str, Any]:
    return {"kind": "lora", "r": r, "alpha": r, **more}


METHODS: dict[str, tuple[Section, Section | None]] = {
    "rslora r 64": (lora(64, use_rslora=True), None),
    "lora r 32": (lora(32), None),
    "full": ({"kind": "full"}, None),
    "ptuning, 20": ({"kind": "ptuning"}, None),
    "prefix, 20": ({"kind": "prefix"}, None),
    "prompt, 20": ({"kind": "prompt"}, None),
    "lora r 8": (lora(8), None),
    "lora r 64": (lora(64), None),
    "lora r 8, dora": (lora(8, use_dora=True), None),
    "lora r 8, pissa": (lora(8, init="pissa"), None),
    "lora r 8, eva": (lora(8, init="eva"), None),
    "lora r 8, lora-ga": (lora(8, init="lora_ga"), None),
    "vera r 256": ({"kind": "vera"}, None),
    "loha r 8": ({"kind": "loha"}, None),
    "lokr r 8": ({"kind": "lokr"}, None),
    "qlora r 8 (nf4)": (lora(8), NF4),
    "qalora r 8 (int4)": ({"kind": "qalora", "r": 8, "alpha": 8, "target_modules": BUT_DOWN}, INT4),
    "partial, last 2 blocks": ({"kind": "partial", "last_blocks": 2}, None),
    "partial, norms": ({"kind": "partial", "parts": ["norms"]}, None),
    "bottleneck, pfeiffer": ({"kind": "bottleneck", "reduction_factor": 4}, None),
    "ia3": ({"kind": "ia3"}, None),
}
"""Name -> adapter section and ``base.quant``."""

PUBLISHED = "rslora r 64 > lora r 32 >= full > ptuning > prefix > prompt"
"""Order of PEFT's method comparison on MetaMathQA and GSM8K (accuracy, Llama-3.2-3B)."""

PUBLISHED_ORDER = (
    *("rslora r 64", "lora r 32", "full", "ptuning, 20", "prefix, 20", "prompt, 20"),
)


@dataclass(frozen=True)
class Cell:
    """One run. ``loss`` and ``before``: nats a token, held out; ``memory`` in bytes."""

    method: str
    rate: float
    seed: int
    loss: float
    before: float
    parameters: int
    memory: int
    seconds: float


# -- running -------------------------------------------------------------------------------------


def make_tree(args: argparse.Namespace, scratch: Path, name: str, cell: tuple[float, int]) -> Any:
    """Return the configuration of a cell of method ``name``: learning rate and seed."""
    adapter, quant = METHODS[name]
    columns = {"prompt": "question", "completion": "answer"}
    files = (("train", "train.jsonl", TRAIN_RECORDS), ("eval", "test.jsonl", HELD_OUT))
    return {
        "base": {"path": str(args.base), "quant": quant, "compute_dtype": "float32"},
        "adapter": dict(adapter),
        "engine": {"activation_checkpointing": False},
        "data": {
            **{
                key: [{"path": str(args.gsm8k / file), "columns": columns, "limit": limit}]
                for key, file, limit in files
            },
            "seq_len": TOKENS,
            "too_long": "drop",
            "cache_dir": str(scratch / "cache"),
        },
        "train": {
            "micro_batch": BATCH,
            "global_batch": BATCH,
            "steps": STEPS,
            "lr": cell[0],
            "warmup": 0.1,
            "seed": cell[1],
            "device": "cpu",
        },
        "save": {"dir": str(scratch / "run"), "every": 0},
    }


def run_cell(args: argparse.Namespace, scratch: Path, name: str, rate: float, seed: int) -> Cell:
    """Train one cell."""
    from common import PeakMemory  # not there where a test imports this file

    config = parse_config(make_tree(args, scratch, name, (rate, seed)))
    run_dir = Path(config.save.dir)
    shutil.rmtree(run_dir, ignore_errors=True)
    start = os.times()
    with PeakMemory() as memory, mock.patch("dist_peft.train.report.PLOTS", ()):
        assert train_from_config(config, World()) == 0
    close_log()
    end = os.times()
    records = read_metrics(run_dir / "metrics.jsonl")
    before, after = records[0].eval_loss_before, records[-1].eval_loss
    assert before is not None and after is not None
    found = re.search(r"training ([\d,]+) parameters", (run_dir / "log.txt").read_text())
    assert found is not None
    parameters = int(found[1].replace(",", ""))
    return Cell(
        name,
        rate,
        seed,
        after,
        before,
        parameters,
        memory.anonymous - memory.before.anonymous,
        end.user + end.system - start.user - start.system,
    )


# -- results -------------------------------------------------------------------------------------


def read_cells(path: Path) -> list[Cell]:
    """Return the cells that were run, of the present settings only."""
    if not path.is_file():
        return []
    result = json.loads(path.read_text())["result"]
    if result["settings"] != settings():
        raise SystemExit(f"{path} is of other settings; remove it")
    return [Cell(**cell) for cell in result["cells"]]


def write_cells(path: Path, cells: Sequence[Cell]) -> None:
    """Write all cells, atomically: an interruption loses the cell that is running."""
    from common import machine

    result = {"settings": settings(), "cells": [asdict(cell) for cell in cells]}
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps({"machine": machine(), "result": result}, indent=1) + "\n")
    partial.replace(path)


def settings() -> dict[str, Any]:
    """What all cells share."""
    return {
        "rates": list(RATES),
        "seeds": list(SEEDS),
        "steps": STEPS,
        "batch": BATCH,
        "tokens": TOKENS,
        "train_records": TRAIN_RECORDS,
        "held_out": HELD_OUT,
    }


def choose_rate(cells: Sequence[Cell], name: str) -> float | None:
    """Return the rate of the lowest held-out loss of the first seed; None before all were run."""
    own = {c.rate: c.loss for c in cells if c.method == name and c.seed == SEEDS[0]}
    return min(own, key=lambda rate: own[rate]) if set(own) == set(RATES) else None


def find_missing(cells: Sequence[Cell], name: str) -> list[tuple[float, int]]:
    """Return rates and seeds that a method lacks: first the sweep, then the other seeds."""
    done = {(c.rate, c.seed) for c in cells if c.method == name}
    if (rate := choose_rate(cells, name)) is None:
        wanted = [(rate, SEEDS[0]) for rate in RATES]
    else:
        wanted = [(rate, seed) for seed in SEEDS]
    return [cell for cell in wanted if cell not in done]


@dataclass(frozen=True)
class Row:
    """A method at its rate, over the seeds: means, and the standard deviation of the loss."""

    method: str
    rate: float
    loss: float
    spread: float
    parameters: int
    memory: float
    seconds: float


def summarize(cells: Sequence[Cell]) -> list[Row]:
    """Return a row for each method whose cells are all there, the lowest loss first."""
    rows = []
    for name in METHODS:
        rate = choose_rate(cells, name)
        if rate is None or find_missing(cells, name):
            continue
        own = [c for c in cells if c.method == name and c.rate == rate]
        losses = [c.loss for c in own]
        rows.append(
            Row(
                name,
                rate,
                statistics.fmean(losses),
                statistics.stdev(losses),
                own[0].parameters,
                statistics.median(c.memory for c in own) / MIB,
                statistics.median(c.seconds for c in own),
            )
        )
    return sorted(rows, key=lambda row: row.loss)


def render(cells: Sequence[Cell]) -> str:
    """Render the table and both orders in Markdown."""
    rows = summarize(cells)
    lines = [
        "| method | lr | held-out loss | trainable | memory MiB | CPU s |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {r.method} | {r.rate:g}{'*' * (r.rate in EDGES)} | {r.loss:.3f} ± {r.spread:.3f} "
        f"| {r.parameters:,} | {r.memory:.0f} | {r.seconds:.1f} |"
        for r in rows
    ]
    # virtual tokens and PiSSA on a quantized base start elsewhere
    before = next((c.before for c in cells if c.method == "full"), cells[0].before)
    mine = [row.method for row in rows if row.method in PUBLISHED_ORDER]
    lines += [
        "",
        f"Untrained base: {before:.3f}. {len(SEEDS)} seeds, ± their standard deviation. A rate "
        "with a * is the lowest or the highest that was tried: a better one may lie beyond.",
        "",
        f"- PEFT's published order: {PUBLISHED}",
        f"- here, by held-out loss: {' > '.join(mine)}",
    ]
    return "\n".join(lines)


def replace_table(page: str, table: str) -> str:
    """Return the page with the table between its marks."""
    pattern = rf"(<!-- {NAME}: [^>]*-->\n).*?(<!-- end -->)"
    text, count = re.subn(pattern, lambda m: f"{m[1]}\n{table}\n\n{m[2]}", page, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{PAGE} has no marks of {NAME}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, help="directory of stories260K-hf")
    parser.add_argument("--gsm8k", type=Path, help="directory with train.jsonl and test.jsonl")
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS / f"{NAME}.json")
    parser.add_argument("--write", action="store_true", help="write the table into the docs")
    args = parser.parse_args()
    cells = read_cells(args.out)
    if args.write:
        PAGE.write_text(replace_table(PAGE.read_text(), render(cells)))
        return
    if args.base is None or args.gsm8k is None:
        parser.error("give --base and --gsm8k, or --write")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.only:
            while missing := find_missing(cells, name):
                with mp.get_context("fork").Pool(1) as pool:
                    cells.append(pool.apply(run_cell, (args, Path(scratch), name, *missing[0])))
                write_cells(args.out, cells)
                print(cells[-1], flush=True)
    print(render(cells))


if __name__ == "__main__":
    main()
