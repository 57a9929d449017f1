"""CPU time of loading a base with and without hashing its rows.

    OMP_NUM_THREADS=1 python benchmarks/hash_cost.py [--base DIR] [--repeats 5]

Both sides load the same base in one process, in turn, so that what else the machine does meets
both; the ratio is of the medians of the process's own CPU seconds. ``hashing`` times the hash
alone, on rows that were just read. Storage is no part of it: the files are in the page cache.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import MIB, make_base, print_table, run_config, write_result

from dist_peft.app.model_setup import build_model
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.span import Span
from dist_peft.engine.single import SingleEngine
from dist_peft.model.base_hashes import build_row_hashes
from dist_peft.model.load import load_model
from dist_peft.store.content import BlockReader, RowHashes, RowsBeingRead
from dist_peft.store.reader import RowReader

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 4000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
"""Rows as long as those of a model of 7 B parameters: the cost is by the row and by the byte."""
QUANTS: dict[str, dict[str, Any] | None] = {
    "nf4": {"kind": "nf4"},
    "int4 rtn": {"kind": "int", "bits": 4, "group_size": 64},
    "none (bfloat16)": None,
}


class TimedRows:
    """The rows of one read, and how long hashing them took."""

    def __init__(self, rows: RowsBeingRead, hashes: "TimedHashes") -> None:
        self._rows, self._hashes = rows, hashes

    def hash_up_to(self, num_bytes: int) -> None:
        begin = time.process_time()
        self._rows.hash_up_to(num_bytes)
        self._hashes.seconds += time.process_time() - begin

    def list_panels(self) -> Iterator[Span]:
        return self._rows.list_panels()

    def finish_hashing(self) -> None:
        begin = time.process_time()
        self._rows.finish_hashing()
        self._hashes.seconds += time.process_time() - begin


class TimedHashes(RowHashes):
    """Hashes, and how long they took."""

    seconds = 0.0

    def begin_hashing(
        self, name: str, first: int, data: torch.Tensor, read_block: BlockReader
    ) -> Any:
        begin = time.process_time()
        rows = super().begin_hashing(name, first, data, read_block)
        self.seconds += time.process_time() - begin
        return rows if rows is None else TimedRows(rows, self)


def load_once(config: Any, hashed: bool) -> tuple[float, float, int]:
    """CPU seconds of the load, of hashing within it, and bytes read."""
    prepared = build_model(resolve_config(config))
    engine = SingleEngine(CPU)
    engine.shard_model(prepared.model, prepared.skeleton.blocks)
    hashes = build_row_hashes(prepared.skeleton) if hashed else None
    if hashes is not None:
        timed = TimedHashes([])
        vars(timed).update(vars(hashes))
        hashes = timed
    with RowReader(prepared.skeleton.index, hashes) as reader:
        begin = time.process_time()
        load_model(prepared.model, reader, engine, CPU)
        seconds = time.process_time() - begin
        return seconds, getattr(hashes, "seconds", 0.0), reader.bytes_read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(tempfile.gettempdir()) / "dist_peft_benchmark_wide_base"
    parser.add_argument("--base", type=Path, default=default, help="made there when absent")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = make_base(args.base, **SIZES)
    rows, result = [], {}
    for name, quant in QUANTS.items():
        config = run_config(base, base={"quant": quant})
        load_once(config, True)
        plain, hashed, alone, size = [], [], [], 0
        for _ in range(args.repeats):
            plain.append(load_once(config, False)[0])
            seconds, own, size = load_once(config, True)
            hashed.append(seconds)
            alone.append(own)
        without, with_hashes = statistics.median(plain), statistics.median(hashed)
        result[name] = {
            "mib": size / MIB,
            "cpu_s_without": plain,
            "cpu_s_with": hashed,
            "cpu_s_of_hashing": alone,
            "share_of_load": (share := statistics.median(alone) / with_hashes),
            "ratio_of_loads": statistics.median(h / p for h, p in zip(hashed, plain, strict=True)),
        }
        numbers = (f"{without:.2f}", f"{with_hashes:.2f}", f"{statistics.median(alone):.3f}")
        rows.append([name, f"{size / MIB:.0f}", *numbers, f"{share:.2%}"])
    print_table(
        ["base.quant", "MiB read", "load CPU s", "with hashes", "hashing s", "of the load"], rows
    )
    write_result("hash_cost", result)


if __name__ == "__main__":
    main()
