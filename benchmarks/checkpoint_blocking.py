"""Time that a step waits for its checkpoint, written in the step and behind it.

``python benchmarks/checkpoint_blocking.py --mib 64 --ranks 1 2 --repeats 5``: training state of
``--mib`` MiB over all ranks (sharded as fsdp2 has it) is saved ``--repeats`` times each way. The
columns are medians of the slowest rank: the whole call both ways, the copy of the rank's own shard
to CPU memory alone, and the time until the checkpoint is published.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from dist_peft.core.world import World
from dist_peft.train.checkpoint import CheckpointManager, RunPosition
from dist_peft.train.checkpoint_writer import StagedState
from tests.support.dist import run_ranks

COLUMNS = 512
TENSORS = 32


def make_state(world: World, mib: float) -> dict[str, Tensor]:
    """Return this rank's part of ``mib`` MiB of float32 in ``TENSORS`` tensors."""
    rows = max(world.size, int(mib * 2**20 / 4 / COLUMNS / TENSORS) // world.size * world.size)
    if world.size == 1:
        return {f"param/{i}": torch.randn(rows, COLUMNS) for i in range(TENSORS)}
    mesh = init_device_mesh("cpu", (world.size,))
    own = rows // world.size
    return {
        f"param/{i}": DTensor.from_local(torch.randn(own, COLUMNS), mesh, [Shard(0)])
        for i in range(TENSORS)
    }


def measure(world: World, directory: Path, mib: float, repeats: int) -> list[float]:
    """Return medians in ms: blocked synchronous, blocked asynchronous, copy, until published."""
    state, rows = make_state(world, mib), []
    for repeat in range(repeats + 1):
        world.barrier()
        start = time.perf_counter()
        StagedState(state, world.is_first)
        copy = time.perf_counter() - start
        times = []
        for asynchronous in (False, True):
            where = directory / str(asynchronous)
            checkpoints = CheckpointManager(where, 1, world, asynchronous=asynchronous)
            world.barrier()
            start = time.perf_counter()
            position = RunPosition(repeat, 0, 0, "base", {})
            checkpoints.save_checkpoint(state, position)
            times.append(time.perf_counter() - start)
            checkpoints.finish_writing()
            published = time.perf_counter() - start
        rows.append(world.max_over_ranks(*times, copy, published))
    return [1000 * statistics.median(column) for column in zip(*rows[1:], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=float, nargs="+", default=[1, 64])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print("| ranks | MiB | synchronous | asynchronous | copy alone | until published |")
    print("|---|---|---|---|---|---|")
    for ranks in args.ranks:
        for mib in args.mib:
            with tempfile.TemporaryDirectory() as name:
                found = run_ranks(measure, ranks, Path(name), mib, args.repeats)[0]
            cells = " | ".join(f"{ms:.0f} ms" for ms in found)
            print(f"| {ranks} | {mib:g} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
