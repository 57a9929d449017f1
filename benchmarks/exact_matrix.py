"""Hashes of exact runs by method, base, engine and number of ranks, and what a step costs.

    python benchmarks/exact_matrix.py [--part matrix|cost] [--only NAME ...] [--ranks 2 3 4]

A cell is a method on a base. It is trained for three steps of seven sequences (four micro-batches)
of TinyStories on stories260K with ``train.exact``: on one process, on fsdp2 with every number of
ranks, and on ZeRO 1, 2 and 3 with up to three. It is equal where the SHA-256 of all parameters and
moments of the last checkpoint, and that of the recorded losses, norms and evaluations, are those of
one process.

The cost is that of a step of LoRA r 16 on a random Llama of 26 M parameters (hidden 512, 8 blocks)
in NF4, one thread: exact and not exact, taking turns, the median of the ratios of neighbouring
steps, in CPU seconds.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, base_argument, make_base, print_table, run_processes, write_result
from method_cost import METHODS, SIZES, Trainer, config_of

sys.path.insert(0, str(Path(__file__).parents[1]))

from dist_peft.core.world import World
from tests.support.dist import run_ranks
from tests.support.exact_runs import digest_losses, digest_state
from tests.support.story_runs import run_config, train

NF4, INT4 = {"kind": "nf4"}, {"kind": "int", "bits": 4, "group_size": 32}
LORA = {"kind": "lora", "r": 3, "alpha": 6, "dropout": 0.1}
CELLS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "lora, nf4": (NF4, LORA),
    "lora, int4": (INT4, LORA),
    "lora, bf16": (None, LORA),
    "dora, nf4": (NF4, {**LORA, "use_dora": True}),
    "lora with embedding, nf4": (NF4, {**LORA, "embeddings": True}),
    "eva, nf4": (NF4, {**LORA, "init": "eva"}),
    "lora_ga, nf4": (NF4, {**LORA, "init": "lora_ga"}),
    "through_quantizer, int4": (
        INT4,
        {"kind": "lora", "r": 3, "alpha": 6, "through_quantizer": True},
    ),
    "qalora, int4": (
        INT4,
        {"kind": "qalora", "r": 3, "target_modules": [r".*self_attn\..*", "gate_proj"]},
    ),
    "adalora, nf4": (
        NF4,
        {"kind": "adalora", "init_r": 4, "target_r": 2, "tinit": 0, "tfinal": 1, "delta_t": 1},
    ),
    "vera, nf4": (NF4, {"kind": "vera", "r": 27}),
    "loha, nf4": (NF4, {"kind": "loha", "r": 3}),
    "lokr, nf4": (NF4, {"kind": "lokr", "r": 3}),
    "ia3, nf4": (NF4, {"kind": "ia3"}),
    "bottleneck, nf4": (NF4, {"kind": "bottleneck", "reduction_factor": 9}),
    "prefix, nf4": (NF4, {"kind": "prefix", "num_virtual_tokens": 3, "encoder_hidden_size": 16}),
    "ptuning, nf4": (NF4, {"kind": "ptuning", "num_virtual_tokens": 3}),
    "prompt, nf4": (NF4, {"kind": "prompt", "num_virtual_tokens": 5}),
    "fusion, nf4": (NF4, {"kind": "fusion"}),
    "partial, nf4": (NF4, {"kind": "partial", "parts": ["norms"], "last_blocks": 1}),
    "full, nf4": (NF4, {"kind": "full"}),
}
"""Base and adapter. A fusion is of two runs of ``SOURCE``."""

TOKENS = (128, 512, 2048)
"""Of the steps whose cost is measured."""

SOURCE = "bottleneck, nf4"
MOST_ZERO_RANKS = 3


def tree_of(data: Path, directory: Path, cell: str, run: str, engine: dict[str, Any]) -> Any:
    quant, adapter = CELLS[cell]
    if adapter["kind"] == "fusion":
        names = [f"source{number}" for number in range(2)]
        adapter = adapter | {"adapters": [str(directory / name / "adapter") for name in names]}
    stories = str(data / "tinystories-1000" / "tinystories_clean.jsonl")
    return run_config(
        data,
        directory,
        base={
            "path": str(data / "stories260K-hf"),
            "quant": quant,
            "compute_dtype": "float32" if quant else "bfloat16",
        },
        adapter=adapter,
        engine=engine,
        data={
            "train": [{"path": stories, "limit": 60}],
            "eval": [{"path": stories, "limit": 5}],
            "packing": False,
            "too_long": "truncate",
            "seq_len": 64,
            "cache_dir": str(directory / "cache"),
        },
        train__exact=True,
        train__steps=3,
        train__global_batch=7,
        train__micro_batch=2,
        save={"dir": str(directory / f"{cell} {run}".replace(" ", "_")), "every": 0},
    )


def train_all(world: World, trees: list[dict[str, Any]]) -> list[str]:
    """An empty text for each run that has ended well, else its error."""
    found = []
    for tree in trees:
        try:
            found.append("" if train(world, tree) == 0 else "stopped")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def train_sources(data: Path, directory: Path) -> None:
    """Train the two adapters that a fusion fuses."""
    for number in range(2):
        tree = tree_of(data, directory, SOURCE, "single", {"kind": "single"})
        tree["train"]["seed"] = number
        tree["save"]["dir"] = str(directory / f"source{number}")
        assert run_ranks(train_all, 1, [tree]) == [[""]]


def engines_of(size: int) -> dict[str, dict[str, Any]]:
    """The ``engine`` sections of a number of ranks, by name."""
    if size == 1:
        return {"single": {"kind": "single"}}
    stages = (1, 2, 3) if size <= MOST_ZERO_RANKS else ()
    return {f"fsdp2, {size} ranks": {"kind": "fsdp2"}} | {
        f"zero {stage}, {size} ranks": {"kind": "zero", "stage": stage} for stage in stages
    }


def run_matrix(data: Path, cells: list[str], ranks: list[int]) -> list[dict[str, Any]]:
    """The digests of each run, and whether they are those of one process."""
    results: dict[tuple[str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        if any(CELLS[cell][1]["kind"] == "fusion" for cell in cells):
            train_sources(data, directory)
        for size in (1, *ranks):
            for run, engine in engines_of(size).items():
                trees = [tree_of(data, directory, cell, run, engine) for cell in cells]
                errors = run_ranks(train_all, size, trees, timeout=3600)[0]
                for cell, tree, error in zip(cells, trees, errors, strict=True):
                    at = Path(tree["save"]["dir"])
                    found = {"error": error} if error else digests(at)
                    results[cell, run] = {"cell": cell, "run": run, **found}
    for (cell, _), result in results.items():
        single = results[cell, "single"]
        keys = ("state", "losses")
        result["equal"] = "state" in result and all(result[k] == single[k] for k in keys)
    return list(results.values())


def digests(run_dir: Path) -> dict[str, str]:
    return {"state": digest_state(run_dir), "losses": digest_losses(run_dir)}


def take_cpu_step(trainer: Trainer) -> float:
    """CPU seconds of one optimizer step of this process, which has one thread."""
    before = time.process_time()
    trainer.step()
    return time.process_time() - before


def measure_cost(base: Path, tokens: int, steps: int) -> dict[str, float]:
    """CPU time of an exact step over that of another, and its CPU seconds."""
    torch.set_num_threads(1)
    config = config_of(base, METHODS["lora, r 16"])
    exact = config.model_copy(update={"train": config.train.model_copy(update={"exact": True})})
    own, other = Trainer(exact, tokens), Trainer(config, tokens)
    pairs = [(take_cpu_step(own), take_cpu_step(other)) for _ in range(steps + 2)][2:]
    return {
        "tokens": tokens,
        "ratio": statistics.median(a / b for a, b in pairs),
        "seconds": statistics.median(a for a, _ in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    base_argument(parser)
    parser.add_argument("--steps", type=int, default=10, help="of the measurement of cost")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 3, 4])
    parser.add_argument("--only", nargs="*", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--data", type=Path, default=os.environ.get("DIST_PEFT_DATA"))
    parser.add_argument(
        "--part", choices=("matrix", "cost"), help="the other's result is kept, and other cells'"
    )
    args = parser.parse_args()
    if args.data is None:
        parser.error("give --data, or set DIST_PEFT_DATA")
    found: dict[str, Any] = {}
    if (file := RESULTS / "exact_matrix.json").is_file():
        known = json.loads(file.read_text())["result"]
        found = {part: known[part] for part in ("matrix", "cost") if part in known}
    if args.part != "cost":
        kept = [row for row in found.get("matrix", []) if row["cell"] not in args.only]
        found["matrix"] = kept + run_matrix(Path(args.data), args.only, args.ranks)
        print_matrix(found["matrix"])
    if args.part != "matrix":
        found["cost"] = measure_costs(args.base, args.steps)
    write_result("exact_matrix", found, RESULTS)


def print_matrix(found: list[dict[str, Any]]) -> None:
    runs = list(dict.fromkeys(row["run"] for row in found))
    cells = list(dict.fromkeys(row["cell"] for row in found))
    marks = {
        (r["cell"], r["run"]): "equal" if r["equal"] else r.get("error", "other")[:60]
        for r in found
    }
    print_table(("cell", *runs), [[c, *(marks[c, run] for run in runs)] for c in cells])


def measure_costs(directory: Path, steps: int) -> list[dict[str, float]]:
    """Measure and print the cost of a step of each size."""
    base = make_base(directory.with_name(f"{directory.name}_512"), **SIZES)
    costs = [run_processes(measure_cost, [(base, t, steps)])[0] for t in TOKENS]
    print_table(
        ("tokens a step", "CPU time of a step, not exact 1", "CPU seconds"),
        [[c["tokens"], f"{c['ratio']:.3f}", f"{c['seconds']:.3f}"] for c in costs],
    )
    return costs


if __name__ == "__main__":
    main()
