"""Host memory of each rank while GPTQ solves an INT4 base, at 1 and 2 ranks.

    python benchmarks/solve_memory.py [--ranks 1 2] [--base DIR] [--samples 4] [--tokens 128]

The promise to check: above the loaded, packed shards, the peak is bounded by one block, whatever
the number of blocks. What is in it at the widest linear, ``in`` columns:

    8 in^2 bytes     the integer sum of Gram matrices, on every rank
    + 3 * 8 in^2     while one rank factors it
    + one linear's rows of this rank in float32, three times
    + the samples' hidden states

so it does not fall with the number of ranks where the Hessian dominates, as it does here.
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

from dist_peft.app.model_setup import build_model, load_weights
from dist_peft.app.resolved_config import resolve_quantization
from dist_peft.compress.gptq_driver import solve_gptq_codes
from dist_peft.core.config.run import NoAdapterConfig
from dist_peft.core.world import World
from dist_peft.model.frozen_linear import FrozenLinear

CPU = torch.device("cpu")


@dataclass(frozen=True)
class RankMemory:
    """One rank, bytes. ``blocks`` of the model, ``widest`` in_features."""

    blocks: int
    ranks: int
    rank: int
    widest: int
    loaded: Memory
    peak: int
    peak_anonymous: int

    def row(self) -> list[object]:
        return [
            self.blocks,
            self.ranks,
            self.rank,
            (self.peak - self.loaded.resident) / MIB,
            (self.peak_anonymous - self.loaded.anonymous) / MIB,
            4 * 8 * self.widest**2 / MIB,
        ]


HEADER = ("blocks", "ranks", "rank", "peak MiB", "peak private MiB", "4 * 8 in^2 MiB")


def measure(base: Path, rank: int, size: int, port: int, samples: int, tokens: int) -> RankMemory:
    torch.set_num_threads(1)
    world = World(rank, size, rank, size, "benchmark", "127.0.0.1", port)
    quant = {"kind": "int", "bits": 4, "group_size": 64, "solver": "gptq"}
    config = run_config(
        base, base={"quant": quant}, engine={"activation_checkpointing": False}
    ).model_copy(update={"adapter": NoAdapterConfig()})
    world.join_process_group(CPU)
    built = load_weights(build_model(resolve_quantization(config)), world, CPU)
    windows = torch.randint(2, 258, (samples, tokens), generator=torch.Generator().manual_seed(0))
    world.barrier()
    with PeakMemory() as memory:
        solve_gptq_codes(built.setup.skeleton, built.engine, windows, world)
    world.barrier()
    linears = [m for m in built.model.modules() if isinstance(m, FrozenLinear) and not m.is_head]
    widest = max(linear.in_features for linear in linears)
    world.leave_process_group()
    blocks = len(built.setup.skeleton.blocks)
    return RankMemory(blocks, size, rank, widest, memory.before, memory.resident, memory.anonymous)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    base_argument(parser)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    results: list[RankMemory] = []
    for blocks in args.blocks:
        directory = args.base.with_name(f"{args.base.name}_{blocks}_blocks")
        base = make_base(directory, num_hidden_layers=blocks, vocab_size=512)
        for size in args.ranks:
            port = free_port()
            each = [(base, r, size, port, args.samples, args.tokens) for r in range(size)]
            results += run_processes(measure, each)
            print(results[-1], flush=True)
    print_table(HEADER, [result.row() for result in results])
    write_result("solve_memory", results)


if __name__ == "__main__":
    main()
