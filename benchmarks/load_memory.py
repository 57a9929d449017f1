"""Host memory of each rank while it loads an NF4 base, at 1, 2 and 3 ranks.

    python benchmarks/load_memory.py [--ranks 1 2 3] [--base DIR]

The promise to check: a rank's peak, above a process that has the same imports and is connected, is

    its share of the packed bytes + the largest slice that it reads + a constant

so that it falls as 1/N. The constant, ``CONSTANT_MIB``, covers the encoder's float32 temporaries
(about seven of 4 MiB) and what building the skeleton takes.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from common import (
    MIB,
    Memory,
    PeakMemory,
    base_argument,
    free_port,
    make_base,
    print_table,
    run_config,
    run_processes,
    write_result,
)
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_peft.app.model_setup import LoadedModel, build_model, load_weights
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.world import World

CONSTANT_MIB = 28 + 16
CPU = torch.device("cpu")


@dataclass(frozen=True)
class RankMemory:
    """One rank, bytes.

    ``empty``: imported and connected. ``prepared``: skeleton and tokenizer are there. ``peak``:
    largest resident set while loading; ``peak_anonymous``: largest private part of it (sampled).
    """

    ranks: int
    rank: int
    empty: Memory
    prepared: Memory
    loaded: Memory
    peak: int
    peak_anonymous: int
    bytes_read: int
    share: int
    largest_slice: int

    def row(self) -> list[object]:
        target = self.share / MIB + self.largest_slice / MIB + CONSTANT_MIB
        above = (self.peak - self.empty.resident) / MIB
        return [
            self.ranks,
            self.rank,
            self.bytes_read / MIB,
            self.share / MIB,
            self.largest_slice / MIB,
            (self.prepared.resident - self.empty.resident) / MIB,
            above,
            (self.peak_anonymous - self.empty.anonymous) / MIB,
            (self.loaded.anonymous - self.empty.anonymous) / MIB,
            target,
            "yes" if above <= target else "NO",
        ]


HEADER = (
    "ranks",
    "rank",
    "read",
    "share",
    "largest slice",
    "skeleton",
    "peak",
    "peak private",
    "rests private",
    "target",
    "peak <= target",
)


def measure(base: Path, rank: int, size: int, port: int) -> RankMemory:
    """Load the base on this rank."""
    torch.set_num_threads(1)
    world = World(rank, size, rank, size, "benchmark", "127.0.0.1", port)
    config = run_config(base)
    world.join_process_group(CPU)
    world.barrier()
    empty = Memory.now()
    prepared = build_model(resolve_config(config))
    after_prepare = Memory.now()
    with PeakMemory() as memory:
        built = load_weights(prepared, world, CPU)
    world.barrier()
    own = sum(_count_own_bytes(built, p) for p in built.model.parameters())
    world.leave_process_group()
    return RankMemory(
        size,
        rank,
        empty,
        after_prepare,
        memory.after,
        memory.resident,
        memory.anonymous,
        built.bytes_read,
        own,
        _largest_slice(built),
    )


def _count_own_bytes(built: LoadedModel, parameter: Tensor) -> int:
    own = built.engine.get_local_bytes(parameter)
    if own is None:
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return own.numel() * own.element_size()


def _largest_slice(built: LoadedModel) -> int:
    """Bytes of the largest piece of a tensor that this rank reads."""
    tensors = built.setup.skeleton.index.tensors
    return max(
        len(built.engine.local_row_span(module.get_parameter(own))) * tensors[name].row_bytes
        for module in built.model.modules()
        for own, name in getattr(module, "checkpoint_names", {}).items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    base_argument(parser)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--mmap-threshold",
        type=int,
        help="MALLOC_MMAP_THRESHOLD_ of the ranks: glibc returns freed blocks above it at once",
    )
    args = parser.parse_args()
    base = make_base(args.base)
    env = {"MALLOC_MMAP_THRESHOLD_": str(args.mmap_threshold)} if args.mmap_threshold else {}
    results: list[RankMemory] = []
    for size in args.ranks:
        port = free_port()
        results += run_processes(measure, [(base, rank, size, port) for rank in range(size)], **env)
    print("MiB; peaks and what rests are above an empty process with the same imports\n")
    print_table(HEADER, [result.row() for result in results])
    name = "load_memory" + (f"_mmap{args.mmap_threshold}" if args.mmap_threshold else "")
    write_result(name, results)


if __name__ == "__main__":
    main()
