"""CPU time of gathering chunks of all ranks on one host: the collective, and broadcasts.

    python benchmarks/gather_cost.py [--ranks 2 3 4] [--mb 0.1 4 32] [--repeats 10]

``engine.chunk_gather`` over gloo, with its broadcasts and without them, turn by turn. ``--mb`` are
the chunks of a rank in MB. Milliseconds of CPU of rank 0, medians.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from common import free_port, print_table, run_processes, write_result

from dist_peft.core.world import World
from dist_peft.engine.chunk_gather import LARGEST_GROUP, all_gather_chunks

WAYS = {"all_gather": 1, "broadcasts": LARGEST_GROUP}


def measure(rank: int, size: int, sizes: Sequence[int], repeats: int) -> dict[str, list[float]]:
    """Return milliseconds by way, for each of ``sizes`` bytes."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    world = World.detect_world()
    world.join_process_group(world.select_device("cpu"))
    group = dist.group.WORLD
    assert group is not None
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for count in sizes:
        local = torch.zeros(count, dtype=torch.uint8)
        output = torch.zeros(size * count, dtype=torch.uint8)
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(repeats + 1):
            for way, largest in WAYS.items():
                world.barrier()
                before = time.process_time()
                all_gather_chunks(output, local, group, largest_group=largest)
                times[way].append(1000 * (time.process_time() - before))
        for way, each in times.items():
            found[way].append(statistics.median(each[1:]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 3, 4, 8])
    parser.add_argument("--mb", nargs="+", type=float, default=[0.1, 4, 32])
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    sizes = [int(1e6 * mb) for mb in args.mb]
    result, rows = {}, []
    for ranks in args.ranks:
        env = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        jobs = [(rank, ranks, sizes, args.repeats) for rank in range(ranks)]
        found = run_processes(measure, jobs, **env, MASTER_PORT=str(free_port()))[0]
        result[ranks] = found
        rows += [
            (ranks, mb, *(f"{found[way][number]:.2f}" for way in WAYS))
            for number, mb in enumerate(args.mb)
        ]
    print_table(("ranks", "MB of a rank", *WAYS), rows)
    write_result("gather_cost", {"mb": args.mb, "ms": result, "load": os.getloadavg()})


if __name__ == "__main__":
    main()
