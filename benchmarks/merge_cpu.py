"""CPU time of a merge and of its verification, against copying the files with ``cp``.

    python benchmarks/merge_cpu.py [--base DIR] [--repeats 5] [--no-consumer]

Sides take turns in one process with one thread, every other round in reverse order as far as a
merge precedes its verification; each round deletes what it wrote. CPU seconds, user and system.
Imports are not counted: a first round that is not counted does them. Building the model from its
configuration, which does not depend on the size of the weights, is counted, and shown apart.
Private memory is the peak above that before the side ran, measured in a second round of its own,
because sampling takes CPU time. The base is made by a process of its own, whose freed memory would
be in the heap of this one.

``least work`` is the floor of a merge in float32: read, widen, add the product, round, write, in
buffers that are allocated once and stay in the processor's cache; tensors without an adapter are
copied inside the kernel. It knows no model, checks nothing and hashes nothing.

State of the page cache: the base is read whole before each side, so that it is cached for all of
them; what a side wrote is deleted before the next one, and written back by no side but the merge,
which ends with ``fsync``.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    MIB,
    PeakMemory,
    make_base,
    print_table,
    run_config,
    run_processes,
    write_result,
)
from merge_memory import make_adapter
from safetensors import safe_open

from dist_peft.core.config.run import BaseConfig, LoraConfig
from dist_peft.export.merge_weights import merge_model
from dist_peft.export.verify import Probe, verify_directory
from dist_peft.export.verify_blocks import verify_by_blocks
from dist_peft.model.base_hashes import build_row_hashes
from dist_peft.model.skeleton import build_skeleton
from dist_peft.store.base_record import BaseRecord
from dist_peft.store.reader import RowReader

PANEL_ELEMENTS = 2**18
"""Weights at a time of the least work: 1 MiB in float32."""

TOKENS = 128
"""Most tokens of a run's probe."""


@dataclass(frozen=True)
class Side:
    """CPU seconds, user and system."""

    user: float
    system: float

    @property
    def seconds(self) -> float:
        return self.user + self.system


def make_large_base(directory: Path) -> Path:
    """A random Llama of 1.04 GiB in bf16 (556 M parameters)."""
    return make_base(
        directory,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=9,
        num_attention_heads=16,
        num_key_value_heads=8,
    )


def read_into_cache(base: Path) -> None:
    """Read all files, so that they are in the page cache."""
    for file in base.iterdir():
        with file.open("rb") as stream:
            while stream.read(2**20):
                pass


def record_base(base: Path, adapter: Path) -> None:
    """Hashes of all tensors, as a run leaves them, so that the merge compares them."""
    skeleton = build_skeleton(run_config(base).base, base)
    hashes = build_row_hashes(skeleton)
    with RowReader(skeleton.index, hashes) as reader:
        for name in skeleton.tensors:
            reader.read_rows(name)
    found = {name: hashes.describe_tensor(name, known.total) for name, known in hashes.sums.items()}
    record = BaseRecord(str(base), skeleton.index.compute_fingerprint(), tensors=found)
    (adapter / "dist_peft.json").write_text(json.dumps(record.to_metadata()))


def do_least_work(base: Path, adapter: Path, out: Path) -> None:
    """Merge with nothing but the bytes: see the module."""
    out.mkdir(exist_ok=True)
    scaling = LoraConfig().alpha / LoraConfig().r
    with safe_open(adapter / "adapter_model.safetensors", "pt") as stored:
        factors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    rows16 = torch.empty(PANEL_ELEMENTS, dtype=torch.bfloat16)
    rows32 = torch.empty(PANEL_ELEMENTS)
    for file in base.glob("*.safetensors"):
        with file.open("rb") as source, (out / file.name).open("wb") as target:
            length = int.from_bytes(source.read(8), "little")
            header, first = json.loads(source.read(length)), 8 + length
            _copy_in_kernel(source.fileno(), target.fileno(), 0, first)
            for name, stored_as in header.items():
                if name == "__metadata__":
                    continue
                begin, end = (first + offset for offset in stored_as["data_offsets"])
                key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
                if f"{key}A.weight" not in factors:
                    _copy_in_kernel(source.fileno(), target.fileno(), begin, end)
                    continue
                A, B = factors[f"{key}A.weight"], factors[f"{key}B.weight"]
                columns = A.shape[1]
                for part in B.split(PANEL_ELEMENTS // columns):
                    size = len(part) * columns
                    half, wide = rows16[:size].view(-1, columns), rows32[:size].view(-1, columns)
                    view = memoryview(half.view(torch.uint8).numpy()).cast("B")
                    os.preadv(source.fileno(), [view], begin)
                    wide.copy_(half).addmm_(part, A, alpha=scaling)
                    half.copy_(wide)
                    begin += os.pwrite(target.fileno(), view, begin)
            os.fsync(target.fileno())


def _copy_in_kernel(source: int, target: int, begin: int, end: int) -> None:
    while begin < end:
        begin += os.copy_file_range(source, target, end - begin, begin, begin)


def measure_memory(run: Callable[[], Any]) -> int:
    """Peak of private memory in bytes above that before."""
    with PeakMemory() as memory:
        run()
    return memory.anonymous - memory.before.anonymous


def measure_time(run: Callable[[], Any]) -> Side:
    before = os.times()
    run()
    after = os.times()
    user = after.user + after.children_user - before.user - before.children_user
    system = after.system + after.children_system - before.system - before.children_system
    return Side(user, system)


def make_sides(base: Path, scratch: Path, *, consumer: bool) -> dict[str, Callable[[], Any]]:
    adapter, out, copy = scratch / "adapter", scratch / "merged", scratch / "copy"
    make_adapter(base, adapter)
    record_base(base, adapter)
    config = run_config(base).base
    merged: BaseConfig = config.model_copy(update={"path": str(out), "quant": None})
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 32000, (1, TOKENS), generator=generator)
    logits = torch.randn(2, TOKENS, 32000, generator=generator)
    probe = Probe(ids, logits[:1], logits[1:])

    def merge() -> None:
        shutil.rmtree(out, ignore_errors=True)
        merge_model(config, base, adapter, out)

    def run_cp() -> None:
        subprocess.run(["cp", "-r", str(base), str(copy)], check=True)

    sides: dict[str, Callable[[], Any]] = {
        "cp": run_cp,
        "least work": lambda: do_least_work(base, adapter, scratch / "least"),
        "building the model": lambda: build_skeleton(config, base),
        "merge --no-verify": merge,
        "--verify blocks": lambda: verify_by_blocks(merged, out, probe),
    }
    if consumer:
        sides["--verify consumer"] = lambda: verify_directory(out, probe, torch.bfloat16)
    return sides


def summarize(rounds: list[dict[str, Side]]) -> dict[str, Any]:
    """Medians of each side, and of its ratio to ``cp`` in the same round."""

    def find_ratio(*names: str) -> float:
        return statistics.median(
            sum(found[name].seconds for name in names) / found["cp"].seconds for found in rounds
        )

    names = list(rounds[0])
    summary: dict[str, Any] = {
        "median_seconds": {n: statistics.median(r[n].seconds for r in rounds) for n in names},
        "median_system_seconds": {n: statistics.median(r[n].system for r in rounds) for n in names},
        "merge_over_cp": find_ratio("merge --no-verify"),
        "least_work_over_cp": find_ratio("least work"),
        "merge_without_building_over_cp": statistics.median(
            (r["merge --no-verify"].seconds - r["building the model"].seconds) / r["cp"].seconds
            for r in rounds
        ),
    }
    for way in ("blocks", "consumer"):
        if f"--verify {way}" in names:
            summary[f"merge_verified_by_{way}_over_cp"] = find_ratio(
                "merge --no-verify", f"--verify {way}"
            )
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, help="default: made for this run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-consumer", action="store_true", help="leave transformers out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        base = args.base or scratch / "base"
        run_processes(make_large_base, [(base,)])
        sides = make_sides(base, scratch, consumer=not args.no_consumer)
        verified = [name for name in sides if name.startswith("--verify")]
        merged = [name for name in sides if name not in verified]
        rounds: list[dict[str, Side]] = []
        peaks: dict[str, int] = {}
        for repeat in range(args.repeats + 2):
            found = {}
            for name in [*merged, *verified] if repeat % 2 else [*merged[::-1], *verified[::-1]]:
                read_into_cache(base)
                if repeat < 2:
                    peaks[name] = measure_memory(sides[name])
                else:
                    found[name] = measure_time(sides[name])
                for written in ("copy", "least"):
                    shutil.rmtree(scratch / written, ignore_errors=True)
            if repeat >= 2:
                rounds.append({name: found[name] for name in sides})
        size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    summary = summarize(rounds)
    ratios = {
        "least work": summary["least_work_over_cp"],
        "merge --no-verify": summary["merge_over_cp"],
        "--verify blocks": summary["merge_verified_by_blocks_over_cp"],
        "--verify consumer": summary.get("merge_verified_by_consumer_over_cp"),
    }
    print(
        f"{size / MIB:.0f} MiB; medians of {args.repeats}; ratios of a merge and this verification"
    )
    print_table(
        ("side", "CPU s", "with the merge, over cp", "private peak +MiB"),
        [
            (
                name,
                f"{seconds:.2f}",
                f"{ratios[name]:.1f}" if ratios.get(name) else "",
                peaks[name] / MIB,
            )
            for name, seconds in summary["median_seconds"].items()
        ],
    )
    without = summary["merge_without_building_over_cp"]
    print(f"\nthe merge without building the model: {without:.2f} times cp")
    load = os.getloadavg()
    result = {"bytes": size, "tokens": TOKENS, "load": load, "private_peak": peaks}
    write_result("merge_cpu", {**result, **summary, "rounds": rounds})


if __name__ == "__main__":
    main()
