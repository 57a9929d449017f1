"""Every adapter method on one real task, with one budget: held-out loss, parameters, memory, time.

    python benchmarks/methods_table.py --base stories260K-hf --gsm8k DIR     # run what is missing
    python benchmarks/methods_table.py --write                               # the table of the docs

The task is GSM8K (Cobbe et al. 2021: questions, and solutions in steps) on a small language model
that has never seen it. All methods get the same sequences in the same order, as many steps, and a
learning rate chosen alike: each rate of ``FIRST_RATES`` once with the first seed, then the next one
of ``RATES`` for as long as the best is the lowest or the highest of those tried, then the best with
the other seeds. The choice is made on the held-out records themselves, for every method: losses are
comparable, and a little lower than those of a rate chosen elsewhere.

AdapterFusion needs trained adapters: two bottleneck adapters, of the same steps on a half of the
same records each. They are made before its cells, and its figures are those of the fusion alone.

Each cell (method, rate, seed) is a run in a process forked from this one, which has the libraries
loaded, and is written to the result at its end; the next call runs the cells that are missing. A
method is a line of ``METHODS`` in ``method_configs.py``.

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
import sys
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

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.method_configs import FUSED_RATE, METHODS, STEPS

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
FIRST_RATES = RATES[2:6]
EDGES = (min(RATES), max(RATES))
SEEDS = (0, 1, 2)
BATCH, TOKENS = 2, 320
TRAIN_RECORDS, HELD_OUT = 120, 30
NAME = "methods_table"
MIB = 2**20
RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"

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
    method = METHODS[name]
    columns = {"prompt": "question", "completion": "answer"}
    files = (("train", "train.jsonl", TRAIN_RECORDS), ("eval", "test.jsonl", HELD_OUT))
    return {
        "base": {"path": str(args.base), "quant": method.quant, "compute_dtype": "float32"},
        "adapter": dict(method.adapter),
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
            **method.train,
        },
        "save": {"dir": str(scratch / "run"), "every": 0},
    }


def train_fused_adapters(args: argparse.Namespace, scratch: Path) -> list[str]:
    """Return the directories of two bottleneck adapters, each of a half of the training records."""
    with (args.gsm8k / "train.jsonl").open() as file:
        lines = [line for line, _ in zip(file, range(TRAIN_RECORDS), strict=False)]
    found = []
    for half in (0, 1):
        made = scratch / f"half{half}"
        found.append(str(made / "adapter"))
        if (made / "adapter").is_dir():
            continue
        records = scratch / f"half{half}.jsonl"
        records.write_text("".join(lines[half::2]))
        tree = make_tree(args, scratch, "bottleneck, pfeiffer", (FUSED_RATE, SEEDS[0]))
        tree["data"]["train"][0]["path"] = str(records)
        tree["save"]["dir"] = str(made)
        with mock.patch("dist_peft.train.report.PLOTS", ()):
            assert train_from_config(parse_config(tree), World()) == 0
        close_log()
    return found


def run_cell(args: argparse.Namespace, scratch: Path, name: str, rate: float, seed: int) -> Cell:
    """Train one cell."""
    from common import PeakMemory  # not there where a test imports this file

    tree = make_tree(args, scratch, name, (rate, seed))
    if tree["adapter"]["kind"] == "fusion":
        fused = train_fused_adapters(args, scratch)
        tree["adapter"]["adapters"] = [
            {"name": f"half{number}", "path": path} for number, path in enumerate(fused)
        ]
    config = parse_config(tree)
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
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps({"machine": machine(), "result": result}, indent=1) + "\n")
    partial.replace(path)


def settings() -> dict[str, Any]:
    """What all cells share."""
    return {
        "rates": list(RATES),
        "first_rates": list(FIRST_RATES),
        "seeds": list(SEEDS),
        "steps": STEPS,
        "batch": BATCH,
        "tokens": TOKENS,
        "train_records": TRAIN_RECORDS,
        "held_out": HELD_OUT,
    }


def find_next_rates(losses: Mapping[float, float]) -> list[float]:
    """Return the rates to try next: the first ones, then a neighbour of a best one at an edge.

    Args:
        losses: by rate, those of the first seed.
    """
    if missing := [rate for rate in FIRST_RATES if rate not in losses]:
        return missing
    tried = sorted(losses)
    best = min(tried, key=lambda rate: losses[rate])
    place = RATES.index(best)
    neighbours = [place - 1] * (best == tried[0]) + [place + 1] * (best == tried[-1])
    return [RATES[n] for n in neighbours if 0 <= n < len(RATES)]


def choose_rate(cells: Sequence[Cell], name: str) -> float | None:
    """Return the rate of the lowest held-out loss of the first seed; None before all were run."""
    losses = {c.rate: c.loss for c in cells if c.method == name and c.seed == SEEDS[0]}
    return None if find_next_rates(losses) else min(losses, key=lambda rate: losses[rate])


def find_missing(cells: Sequence[Cell], name: str) -> list[tuple[float, int]]:
    """Return rates and seeds that a method lacks: first the sweep, then the other seeds."""
    own = [c for c in cells if c.method == name]
    if (rate := choose_rate(own, name)) is None:
        losses = {c.rate: c.loss for c in own if c.seed == SEEDS[0]}
        return [(rate, SEEDS[0]) for rate in find_next_rates(losses)]
    done = {(c.rate, c.seed) for c in own}
    return [(rate, seed) for seed in SEEDS if (rate, seed) not in done]


@dataclass(frozen=True)
class Row:
    """A method at its rate, over the seeds: means, and the standard deviation of the loss.

    ``is_final``: neighbours of the rate were tried, and are worse.
    """

    method: str
    rate: float
    is_final: bool
    loss: float
    spread: float
    parameters: int
    memory: float
    seconds: float


def summarize(cells: Sequence[Cell]) -> list[Row]:
    """Return a row for each method that has all seeds at a rate, the lowest loss first.

    A method whose rates are still widened has the best of those that all seeds were run with.
    """
    rows = []
    for name in METHODS:
        mine = [c for c in cells if c.method == name]
        first = {c.rate: c.loss for c in mine if c.seed == SEEDS[0]}
        seeds = {rate: {c.seed for c in mine if c.rate == rate} for rate in first}
        whole = [rate for rate in first if seeds[rate] == set(SEEDS)]
        if not whole or not set(FIRST_RATES) <= set(first):
            continue
        rate = min(whole, key=lambda rate: first[rate])
        own = [c for c in mine if c.rate == rate]
        losses = [c.loss for c in own]
        rows.append(
            Row(
                name,
                rate,
                rate == choose_rate(cells, name) and rate not in EDGES,
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
        f"| {r.method} | {r.rate:g}{'*' * (not r.is_final)} | {r.loss:.3f} ± {r.spread:.3f} "
        f"| {r.parameters:,} | {r.memory:.0f} | {r.seconds:.1f} |"
        for r in rows
    ]
    # virtual tokens and PiSSA on a quantized base start elsewhere
    before = next((c.before for c in cells if c.method == "full"), cells[0].before)
    mine = [row.method for row in rows if row.method in PUBLISHED_ORDER]
    lines += [
        "",
        f"Untrained base: {before:.3f}. {len(SEEDS)} seeds, ± their standard deviation. A rate "
        "with a * has a neighbour that was not tried with all seeds, and may be better.",
        "",
        f"- PEFT's published order: {PUBLISHED}",
        f"- here, by held-out loss: {' > '.join(mine)}",
    ]
    return "\n".join(lines)


def replace_table(page: str, table: str, name: str = NAME) -> str:
    """Return the page with the table between the marks of ``name``."""
    pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- end -->)"
    text, count = re.subn(pattern, lambda m: f"{m[1]}\n{table}\n\n{m[2]}", page, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"the page has no marks of {name}")
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
                    made = pool.apply(run_cell, (args, Path(scratch), name, *missing[0]))
                cells = [*read_cells(args.out), made]  # another process may run other methods
                write_cells(args.out, cells)
                print(made, flush=True)
    print(render(cells))


if __name__ == "__main__":
    main()
