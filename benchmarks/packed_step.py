"""CPU time of a training step on packed sequences, on single documents, and with a mask.

    python benchmarks/packed_step.py [--lengths 1024 2048 4096] [--repeats 5]

All sides compute the same documents with the same small Llama (2 layers, hidden 256, NF4, LoRA of
rank 16, activation checkpointing) in one process and take turns; seconds are the process's own.

    packed          one sequence of S tokens that holds 8 documents, attention by document
    mask            the same sequence with transformers' mask of all pairs
    one document    one sequence of S tokens that is one document
    single          the 8 documents as a batch of 8 padded sequences
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import make_base, print_table, run_config, write_result

from dist_peft.app.model_setup import build_model, load_weights
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.world import World
from dist_peft.data.loader import Batch
from dist_peft.model.document_attention import DOCUMENT_ATTENTION
from dist_peft.train.objective import TokenObjective
from dist_peft.train.optimizers import make_optimizer_factory

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 4000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
}
DOCUMENTS = 8


def split_unevenly(length: int) -> list[int]:
    """Lengths of the documents: from half of the mean to one and a half of it."""
    mean = length // DOCUMENTS
    lengths = [mean // 2 + mean * i // (DOCUMENTS - 1) for i in range(DOCUMENTS - 1)]
    return [*lengths, length - sum(lengths)]


def make_packed(lengths: Sequence[int]) -> Batch:
    size = sum(lengths)
    ids = torch.arange(size)[None] * 7 % 3900
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.roll(-1, 1)
    labels[0, torch.tensor(lengths).cumsum(0) - 1] = -100
    return Batch(ids, labels, positions, torch.zeros(1, dtype=torch.long))


def make_single(packed: Batch, lengths: Sequence[int]) -> Batch:
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    labels, positions = torch.full_like(ids, -100), torch.zeros_like(ids)
    start = 0
    for row, n in enumerate(lengths):
        ids[row, :n] = packed.input_ids[0, start : start + n]
        labels[row, :n] = packed.labels[0, start : start + n]
        positions[row, :n] = torch.arange(n)
        positions[row, n:] = torch.arange(width - n)
        start += n
    return Batch(ids, labels, positions, torch.arange(len(lengths)), is_packed=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(tempfile.gettempdir()) / "dist_peft_benchmark_narrow_base"
    parser.add_argument("--base", type=Path, default=default, help="made there when absent")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = make_base(args.base, **SIZES)
    config = run_config(base, base={"compute_dtype": args.dtype})
    built = load_weights(build_model(resolve_config(config)), World(), CPU)
    call = built.setup_optimizer(make_optimizer_factory(config.train, CPU))
    text: Any = built.model.config
    objective = TokenObjective()

    def run_step(batch: Batch, attention: str) -> tuple[float, float]:
        text._attn_implementation = attention
        begin = time.process_time()
        built.setup.adapter.begin_micro_batch(0, batch.sample_ids)
        loss = objective.compute_loss(built.model, batch, CPU, call) / 1000
        built.engine.backward(loss, last=True)
        built.engine.step(0.0, 1.0)
        return time.process_time() - begin, float(loss.detach())

    rows, result = [], {}
    for length in args.lengths:
        lengths = split_unevenly(length)
        packed = make_packed(lengths)
        sides = {
            "packed": (packed, DOCUMENT_ATTENTION),
            "mask": (packed, "sdpa"),
            "one document": (make_packed([length]), DOCUMENT_ATTENTION),
            "single": (make_single(packed, lengths), DOCUMENT_ATTENTION),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        losses: dict[str, float] = {}
        for repeat in range(args.repeats + 1):
            for name, (batch, attention) in sides.items():
                spent, losses[name] = run_step(batch, attention)
                if repeat:
                    seconds[name].append(spent)
        assert abs(losses["packed"] / losses["mask"] - 1) < 1e-2, losses
        assert abs(losses["packed"] / losses["single"] - 1) < 1e-2, losses
        middle = {name: statistics.median(found) for name, found in seconds.items()}
        ratios = {name: found / middle["packed"] for name, found in middle.items()}
        result[length] = {"cpu_s": seconds, "over_packed": ratios}
        cells = [f"{middle[name]:.2f} ({ratios[name]:.2f})" for name in sides]
        rows.append([length, *cells])
    print_table(["tokens", *(f"{name}: CPU s (over packed)" for name in sides)], rows)
    write_result(f"packed_step_{args.dtype}", result)


if __name__ == "__main__":
    main()
