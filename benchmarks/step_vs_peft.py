"""A training step here, in PEFT + bitsandbytes' plain loop, in Trainer and in TRL: CPU seconds.

    python benchmarks/step_vs_peft.py [--ranks 1 2] [--dtype float32|bfloat16] [--rounds 3]
        [--steps 3] [--rows 4] [--tokens 512] [--hidden 1024] [--blocks 8]
        [--no-double-quant] [--no-checkpointing] [--memory] [--label TEXT]

The defaults are the product's: bfloat16, double quantization, blocks recomputed, packed rows. Every
side has the same base, adapter (LoRA, r = 16, all linears, without dropout), rows and optimizer. A
row is packed from four documents: here they attend to themselves alone, in the other sides to all
before them, which is what a packed row is there without a flash-attention kernel.

    dist_peft   the project's own step; on several ranks the packed base is sharded (fsdp2)
    plain       PEFT on a bitsandbytes base, a hand-written loop; on several ranks each has the
                whole base, and adapters are reduced by DistributedDataParallel
    trainer     the same model in transformers' Trainer
    trl         in TRL's SFTTrainer; only where TRL is installed

All sides live in one process per rank and take turns in rounds of ``--steps`` optimizer steps after
one that is not counted. Counted are the CPU seconds of the processes of all ranks, one thread each:
waiting for another process costs nothing. Trainer's step lasts from one ``on_step_end`` to the
next. ``ratio`` is the median over rounds of a side's seconds over dist_peft's in the same round:
above 1, dist_peft is faster. ``--memory`` measures one side a process and one rank.

In float32, without double quantization, on one rank and with ``--documents 1`` the first losses
must agree to rounding, else the script fails.
"""

import argparse
import importlib.util
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import (
    MIB,
    Memory,
    PeakMemory,
    base_argument,
    free_port,
    make_base,
    print_table,
    run_processes,
    write_result,
)
from step_sides import DEVICE, SIDES, Settings, copy_start

from dist_peft.core.world import World

# -- measuring -------------------------------------------------------------------------------------

Rounds = dict[str, list[tuple[list[float], list[float]]]]


def alternate(
    rank: int, size: int, base: Path, sides: Sequence[str], settings: Settings, rounds: int, k: int
) -> Rounds:
    """Side -> (losses, seconds) of each round, on this rank."""
    world = World()
    if size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
        world = World.detect_world()
        world.join_process_group(world.select_device(DEVICE.type))
    built = {name: SIDES[name](base, world, settings) for name in sides}
    if size == 1 and "plain" in built:
        copy_start(built["dist_peft"][0], built["plain"][0])
    results: Rounds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (_, run_round) in built.items():
            results[name].append(run_round(k))
            world.barrier()
    return results


def compare_sides(base: Path, ranks: int, settings: Settings, args: Any) -> dict[str, Any]:
    jobs = [(r, ranks, base, args.sides, settings, args.rounds, args.steps) for r in range(ranks)]
    env = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    measured: list[Rounds] = run_processes(alternate, jobs, **(env if ranks > 1 else {}))
    seconds = {
        name: [
            statistics.mean(
                sum(step) for step in zip(*(each[name][i][1][1:] for each in measured), strict=True)
            )
            for i in range(args.rounds)
        ]
        for name in args.sides
    }
    exact = settings.dtype == "float32" and not settings.double_quant and settings.documents == 1
    if ranks == 1 and exact and "plain" in args.sides:
        pair = (torch.tensor(measured[0][name][0][0]) for name in ("dist_peft", "plain"))
        torch.testing.assert_close(*pair, rtol=1e-4, atol=0)
    ours = seconds["dist_peft"]
    return {
        "seconds": seconds,
        "losses": {name: measured[0][name][0][0] for name in args.sides},
        "ratio": {
            name: statistics.median(b / a for a, b in zip(ours, each, strict=True))
            for name, each in seconds.items()
        },
    }


def measure_memory(name: str, base: Path, settings: Settings) -> dict[str, int]:
    """Bytes above the process before: peak while building, what rests, peak in two steps."""
    torch.set_num_threads(1)
    empty = Memory.now()
    with PeakMemory() as building:
        _, run_round = SIDES[name](base, World(), settings)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with PeakMemory() as stepping:
        run_round(1)
    return {
        "build_peak": building.resident - empty.resident,
        "rests": building.after.anonymous - empty.anonymous,
        "step_peak": stepping.resident - empty.resident,
        "step_peak_anonymous": stepping.anonymous - empty.anonymous,
        "cuda_step_peak": torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    base_argument(parser)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="default: all that are installed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="counted, of each side and round")
    parser.add_argument("--rows", type=int, default=4, help="of each step, on all ranks together")
    parser.add_argument("--tokens", type=int, default=512, help="of a row")
    parser.add_argument("--documents", type=int, default=4, help="packed into a row")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size of the base")
    parser.add_argument("--blocks", type=int, default=8, help="of the base")
    parser.add_argument("--vocabulary", type=int, default=32000, help="of the base")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--no-double-quant", dest="double_quant", action="store_false")
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--label", default="", help="added to the name of the result")
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    installed = [n for n in SIDES if n != "trl" or importlib.util.find_spec("trl")]
    args.sides = list(dict.fromkeys(["dist_peft", *(args.sides or installed)]))
    if any(args.rows % ranks for ranks in args.ranks):
        parser.error("--rows must be a multiple of each of --ranks: Trainer deals whole rows")
    return args


def main() -> None:
    args = parse_arguments()
    sizes = {
        "hidden_size": args.hidden,
        "intermediate_size": args.hidden * 11 // 4,
        "num_hidden_layers": args.blocks,
        "num_attention_heads": args.hidden // 64,
        "num_key_value_heads": max(1, args.hidden // 128),
        "vocab_size": args.vocabulary,
    }
    name = f"{args.base.name}_{args.hidden}_{args.blocks}_{args.vocabulary}"
    base = make_base(args.base.with_name(name), **sizes)
    settings = Settings(
        args.dtype, args.double_quant, args.checkpointing, args.rows, args.tokens, args.documents
    )
    print(f"{settings} on {DEVICE}\n")
    result: dict[str, Any] = {"settings": settings, "base": sizes, "ranks": {}}
    for ranks in args.ranks:
        found = result["ranks"][ranks] = compare_sides(base, ranks, settings, args)
        rows = [
            (ranks, name, f"{statistics.median(each):.2f}", f"{found['ratio'][name]:.2f}")
            for name, each in found["seconds"].items()
        ]
        print_table(("ranks", "side", "CPU s a step", "over dist_peft"), rows)
    if args.memory:
        memory = {n: run_processes(measure_memory, [(n, base, settings)])[0] for n in args.sides}
        header = ("MiB above empty", *memory["dist_peft"])
        print_table(header, [(n, *(c / MIB for c in m.values())) for n, m in memory.items()])
        result["memory"] = memory
    write_result(f"step_vs_peft_{DEVICE.type}_{args.dtype}{args.label}", result)


if __name__ == "__main__":
    main()
