"""Large models on 2 to 512 ranks, in one process and without weights.

    python benchmarks/fake_world.py [--cases NAME ...] [--read-at-most MIB] [--directory DIR]

Every case has a full-width model from ``configs/bases`` over sparse files (headers with holes), one
rank of a process group that sends nothing, and the project's own skeleton, engine, loader and plan:

* the rows of all ranks add up to the packed model;
* a rank reads 1/N of the files: computed for every tensor, and where its share is below
  ``--read-at-most`` (300 MiB) really read, encoded and kept, with the files that are open meanwhile
  and the largest private memory above that of the process before it;
* largest tensors of each phase of a step (traced on fake tensors), and bytes gathered.

Values do not exist: zeros are read, nothing is sent, nothing is multiplied. Cases that are not
named keep their result of an earlier run.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import MIB, RESULTS, Memory, PeakMemory, print_table, run_config, write_result

from dist_peft.core.config.run import BaseConfig
from dist_peft.core.host_memory import return_freed_memory, trim_heap
from dist_peft.core.span import row_span
from dist_peft.core.world import World
from dist_peft.engine import make_engine
from dist_peft.engine.fake_ranks import fake_process_group
from dist_peft.model.experts import ExpertStack
from dist_peft.model.frozen_linear import FrozenWeight
from dist_peft.model.load import load_model
from dist_peft.plan.cluster import Cluster
from dist_peft.plan.host import count_stack_rows
from dist_peft.plan.planned_model import PlannedModel, build_planned_model
from dist_peft.plan.run_plan import plan_run
from dist_peft.store.reader import RowReader

BASES = Path(__file__).parent.parent / "configs" / "bases"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A model on some nodes of eight cards (fewer where there are fewer ranks)."""

    base: str
    ranks: int
    seq_len: int = 2048

    @property
    def name(self) -> str:
        return f"{self.base}@{self.ranks}"


CASES = (
    Case("llama-3.1-8b", 64),
    Case("llama-65b", 2, 1024),
    Case("llama-3.1-70b", 32, 8192),
    Case("llama-3.1-70b", 512, 8192),
    Case("qwen2.5-72b", 8),
    Case("mixtral-8x22b", 64),
    Case("llama-3.1-405b", 64),
    Case("llama-3.1-405b", 512, 8192),
    Case("deepseek-v3-bf16", 512),
    Case("deepseek-v3-fp8", 64),
    Case("gpt-oss-120b", 64),
    Case("qwen3-235b-a22b", 64),
    Case("llama-4-maverick", 64),
    Case("kimi-k2-int4", 64),
)


@dataclass(frozen=True)
class CaseResult:
    """Of one case; bytes. ``read``, ``open_files``, ``peak`` (private memory while it was read,
    above that of before) and ``kept`` (the same afterwards) are None where it was not read."""

    name: str
    parameters: int
    stored: int
    rows_least: int
    rows_most: int
    rows_sum: int
    files: int
    file_bytes: int
    to_read: int
    read: int | None
    open_files: int | None
    peak: int | None
    kept: int | None
    phases: dict[str, int]
    resting: int
    gathered: int
    cpu_seconds: float

    def row(self) -> list[object]:
        phases = [self.phases.get(n, 0) / MIB for n in ("forward", "head", "backward", "step")]
        whole = "yes" if self.rows_sum == self.stored else "NO"
        return [
            self.name,
            self.stored / 2**30,
            whole,
            f"{self.rows_least / MIB:.1f}-{self.rows_most / MIB:.1f}",
            self.file_bytes / self.to_read,
            "-" if self.read is None else f"{self.read / MIB:.1f}",
            "-" if self.open_files is None else self.open_files,
            "-" if self.peak is None else f"{self.peak / MIB:.1f}",
            "-" if self.kept is None else f"{self.kept / MIB:.1f}",
            self.resting / MIB,
            *phases,
            self.gathered / 2**30,
            self.cpu_seconds,
        ]


HEADER = (
    "model@ranks",
    "stored GiB",
    "sum equal",
    "rows of a rank MiB",
    "files / to read",
    "read MiB",
    "open files",
    "peak MiB",
    "kept MiB",
    "rest MiB",
    "forward",
    "head",
    "backward",
    "step MiB",
    "gathered GiB",
    "CPU s",
)


def run_case(case: Case, read_at_most: int = 300 * MIB) -> CaseResult:
    """Run one case. Shares larger than ``read_at_most`` bytes are not read."""
    start = time.process_time()
    cards = min(8, case.ranks)
    cluster = Cluster(case.ranks // cards, cards, 80 * 2**30)
    file = BASES / f"{case.base}.json"
    text = file.read_text()
    experts = "expert" in text  # have no dropout
    config = run_config(
        Path("not/downloaded"),
        adapter={"dropout": 0.0 if experts else 0.05},
        data={"train": ["unused.jsonl"], "seq_len": case.seq_len, "packing": True},
        train={"global_batch": 2 * case.ranks},
    )
    if "quantization_config" in text:  # decides the codec
        config = config.model_copy(update={"base": BaseConfig(path=config.base.path)})
    with tempfile.TemporaryDirectory() as scratch:
        planned = build_planned_model(config, file, Path(scratch))
        plan = plan_run(planned, cluster)
        world = cluster.make_world(config.engine, rank=case.ranks // 2)
        share = count_bytes_to_read(planned, world)
        loaded = load_share(planned, world) if share <= read_at_most else LoadedShare()
    index = planned.skeleton.index
    parameters = list(planned.skeleton.tensors.values())
    return CaseResult(
        case.name,
        sum(torch.Size(spec.shape).numel() for spec in parameters),
        plan.stored,
        min(plan.own_rows),
        max(plan.own_rows),
        sum(plan.own_rows),
        len(index.files),
        sum(info.stop - info.start for info in index.tensors.values()),
        share,
        loaded.read,
        loaded.open_files,
        loaded.peak,
        loaded.kept,
        {phase.phase: phase.total for phase in plan.memory.phases},
        plan.resting.device_total,
        plan.traffic.gathered,
        time.process_time() - start,
    )


def count_bytes_to_read(planned: PlannedModel, world: World) -> int:
    """Return the bytes of a rank's rows in the files; of a prequantized weight, those of a row in
    its packed form, which differ by rounding to words and by copied scales."""
    sizes = {spec.name: spec.num_bytes for spec in planned.skeleton.tensors.values()}
    for module in planned.skeleton.model.modules():
        if isinstance(module, FrozenWeight) and module.stored is not None:
            row = module.codec.num_row_bytes(module.in_features)
            if isinstance(module, ExpertStack):
                sizes |= {piece.name: row * len(piece.span) for piece in module.pieces}
            else:
                sizes[module.source] = row * module.out_features
    return sum(
        len(row_span(rows, world.size, world.rank)) * (sizes[spec.name] // rows)
        for spec in planned.skeleton.tensors.values()
        if (rows := count_stack_rows(spec.shape))
    )


@dataclass(frozen=True)
class LoadedShare:
    """Bytes of a rank's rows: read from the files, private memory at its largest and afterwards."""

    read: int | None = None
    open_files: int | None = None
    peak: int | None = None
    kept: int | None = None


def load_share(planned: PlannedModel, world: World) -> LoadedShare:
    """Load a rank's rows as a run does."""
    skeleton, config = planned.skeleton, planned.config
    with fake_process_group(world):
        engine = make_engine(config.engine, config.train, world, CPU)
        trim_heap()  # what planning has freed would hold a part of the rows
        with PeakMemory() as memory:
            engine.shard_model(skeleton.model, skeleton.blocks)
            with return_freed_memory(), RowReader(skeleton.index) as reader:
                load_model(skeleton.model, reader, engine, CPU)
                opened = count_open_files(skeleton.index.path)
                read = reader.bytes_read
            kept = Memory.now().anonymous
        before = memory.before.anonymous
        return LoadedShare(read, opened, memory.anonymous - before, kept - before)


def count_open_files(directory: Path) -> int:
    """Return the number of descriptors of this process on safetensors files of ``directory``."""
    files = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    names = [os.readlink(file) for file in files if os.path.exists(file)]
    own = {str(file.resolve()) for file in directory.glob("*.safetensors")}
    return sum(name in own for name in names)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    known = {case.name: case for case in CASES}
    parser.add_argument("--cases", nargs="+", choices=known, default=list(known))
    parser.add_argument("--read-at-most", type=float, default=300, help="MiB of a rank")
    parser.add_argument("--directory", type=Path, default=RESULTS, help="of the result")
    args = parser.parse_args(arguments)
    results = []
    for name in args.cases:
        results.append(run_case(known[name], int(args.read_at_most * MIB)))
        print(f"{name}: {results[-1].cpu_seconds:.1f} CPU s", flush=True)
    print_table(HEADER, [result.row() for result in results])
    file = args.directory / "fake_world.json"
    earlier = json.loads(file.read_text())["result"] if file.is_file() else []
    found: dict[str, dict[str, Any]] = {row["name"]: row for row in earlier}
    found |= {result.name: asdict(result) for result in results}
    write_result("fake_world", [found[n] for n in known if n in found], args.directory)


if __name__ == "__main__":
    main()
