"""A training step here, in PEFT + bitsandbytes' plain loop, in Trainer and in TRL: CPU seconds.

    python benchmarks/step_vs_peft.py [--ranks 1 2] [--dtype float32|bfloat16] [--rounds 3]
        [--steps 3] [--rows 4] [--tokens 512] [--no-double-quant] [--no-checkpointing] [--memory]

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

Without double quantization and in float32 the first losses of all sides agree to rounding on one
rank with ``--documents 1``; the script fails when they do not.
"""

import argparse
import importlib.util
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    run_config,
    run_processes,
    write_result,
)
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from dist_peft.app.model_setup import build_model, load_weights
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.world import World
from dist_peft.data.loader import Batch
from dist_peft.train.loop import TrainingStep
from dist_peft.train.objective import TokenObjective
from dist_peft.train.optimizers import make_optimizer_factory

LR = 1e-3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

StepRound = Callable[[int], tuple[list[float], list[float]]]
"""Steps -> (loss, seconds) of each, the first of them not to be counted."""


@dataclass(frozen=True)
class Settings:
    """What all sides share; ``rows`` of ``tokens`` each are one optimizer step of all ranks."""

    dtype: str
    double_quant: bool
    checkpointing: bool
    rows: int
    tokens: int
    documents: int


# -- rows ------------------------------------------------------------------------------------------


def make_row(index: int, settings: Settings) -> Batch:
    """Random tokens; rows repeat after one optimizer step, so that the loss falls."""
    generator = torch.Generator().manual_seed(index % settings.rows)
    ids = torch.randint(3, 500, (1, settings.tokens), generator=generator)
    lengths = [len(part) for part in torch.arange(settings.tokens).tensor_split(settings.documents)]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.roll(-1, 1)
    labels[0, torch.tensor(lengths).cumsum(0) - 1] = -100
    return Batch(ids, labels, positions, torch.tensor([index]))


def deal_rows(world: World, settings: Settings) -> list[Batch]:
    """This rank's rows of each step, one a micro-batch."""
    return [make_row(i, settings) for i in range(world.rank, settings.rows, world.size)]


def time_steps(step: Callable[[], float]) -> StepRound:
    def run_round(steps: int) -> tuple[list[float], list[float]]:
        losses, seconds = [], []
        for _ in range(steps + 1):
            before = read_clock()
            losses.append(step())
            seconds.append(read_clock() - before)
        return losses, seconds

    return run_round


def read_clock() -> float:
    """CPU seconds of this process; on CUDA wall seconds after the device has finished."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


# -- sides -----------------------------------------------------------------------------------------


def build_ours(base: Path, world: World, settings: Settings) -> tuple[Any, StepRound]:
    config = run_config(
        base,
        base={
            "quant": {"kind": "nf4", "double_quant": settings.double_quant},
            "compute_dtype": settings.dtype,
        },
        engine={
            "kind": "fsdp2" if world.size > 1 else "single",
            "activation_checkpointing": settings.checkpointing,
        },
        train={"lr": LR, "precision": "fp32"},
    )
    built = load_weights(build_model(resolve_config(config)), world, DEVICE)
    adapter = built.setup.adapter
    call = built.engine.setup_optimizer(
        built.model, make_optimizer_factory(config.train, DEVICE), adapter.get_lr_scale
    )
    part = TrainingStep(built.model, call, built.engine, adapter, TokenObjective(), world)
    rows = deal_rows(world, settings)
    targets = settings.rows * (settings.tokens - settings.documents)
    numbers = itertools.count()

    def step() -> float:
        number = next(numbers)
        loss = part.accumulate_gradients(number, rows, targets)
        part.update_parameters(number, loss, LR, 1.0)
        return float(loss)

    return built.model, time_steps(step)


def build_peft(base: Path, settings: Settings) -> Any:
    dtype = getattr(torch, settings.dtype)
    quant = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=quant, device_map={"": DEVICE.type}
    )
    if settings.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora).train()


def build_plain(base: Path, world: World, settings: Settings) -> tuple[Any, StepRound]:
    model = build_peft(base, settings)
    parameters = [p for p in model.parameters() if p.requires_grad]
    call = DistributedDataParallel(model) if world.size > 1 else model
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)
    rows = deal_rows(world, settings)
    targets = settings.rows * (settings.tokens - settings.documents)

    def step() -> float:
        total = 0.0
        for index, row in enumerate(rows):
            if world.size > 1:
                call.require_backward_grad_sync = index == len(rows) - 1
            logits = call(input_ids=row.input_ids.to(DEVICE), use_cache=False).logits
            flat = logits.float().flatten(0, 1)
            labels = row.labels.to(DEVICE).flatten()
            # DistributedDataParallel averages over ranks
            loss = functional.cross_entropy(flat, labels, reduction="sum") / targets * world.size
            loss.backward()
            total += float(loss.detach()) / world.size
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return model, time_steps(step)


class _StepClock(TrainerCallback):  # type: ignore[misc]
    """Reads the clock at the end of each step."""

    def __init__(self) -> None:
        self.readings: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.readings.append(read_clock())


class _Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Trainer's rows: it deals them to the ranks itself."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __len__(self) -> int:
        return 1000 * self.settings.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = make_row(index, self.settings)
        # Trainer's models shift the labels themselves
        return {"input_ids": row.input_ids[0], "labels": row.labels[0].roll(1)}


def make_trainer_arguments(world: World, settings: Settings, cls: type[Any]) -> dict[str, Any]:
    common = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": settings.rows // world.size,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "bf16": settings.dtype == "bfloat16",
        "gradient_checkpointing": settings.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "use_cpu": DEVICE.type == "cpu",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1000,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
    }
    return {"args": cls(**common)} if cls is TrainingArguments else common


def build_trainer(base: Path, world: World, settings: Settings) -> tuple[Any, StepRound]:
    model = build_peft(base, settings)

    def make_trainer(steps: int, clock: _StepClock) -> Trainer:
        arguments = make_trainer_arguments(world, settings, TrainingArguments)
        arguments["args"].max_steps = steps
        rows = _Rows(settings)
        return Trainer(model=model, train_dataset=rows, callbacks=[clock], **arguments)

    return model, time_trainer(make_trainer)


def build_trl(base: Path, world: World, settings: Settings) -> tuple[Any, StepRound]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = build_peft(base, settings)
    rows = _Rows(settings)
    listed = [{k: v.tolist() for k, v in rows[i].items()} for i in range(settings.rows)]

    def make_trainer(steps: int, clock: _StepClock) -> Any:
        arguments = make_trainer_arguments(world, settings, SFTConfig)
        options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
        config = SFTConfig(**arguments, max_steps=steps, **options)
        dataset = Dataset.from_list(listed * (steps + 1))
        return SFTTrainer(model=model, args=config, train_dataset=dataset, callbacks=[clock])

    return model, time_trainer(make_trainer)


def time_trainer(make_trainer: Callable[[int, _StepClock], Any]) -> StepRound:
    def run_round(steps: int) -> tuple[list[float], list[float]]:
        clock = _StepClock()
        result = make_trainer(steps + 1, clock).train()
        seconds = [b - a for a, b in itertools.pairwise(clock.readings)]
        # one loss is Trainer's mean of all steps: the rounds are compared by their times alone
        return [result.training_loss], [0.0, *seconds]

    return run_round


SIDES = {
    "dist_peft": build_ours,
    "plain": build_plain,
    "trainer": build_trainer,
    "trl": build_trl,
}


def copy_start(source: Any, target: Any) -> None:
    """Give PEFT's LoRA the start values of ours (one rank: nothing is sharded)."""
    start = {n: p.detach() for n, p in source.named_parameters() if p.requires_grad}
    for name, parameter in target.named_parameters():
        if parameter.requires_grad:
            own = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            parameter.data.copy_(start.pop(own))
    assert not start, f"without a partner: {list(start)[:3]}"


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
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--no-double-quant", dest="double_quant", action="store_false")
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    installed = [n for n in SIDES if n != "trl" or importlib.util.find_spec("trl")]
    args.sides = list(dict.fromkeys(["dist_peft", *(args.sides or installed)]))
    if any(args.rows % ranks for ranks in args.ranks):
        parser.error("--rows must be a multiple of each of --ranks: Trainer deals whole rows")
    return args


def main() -> None:
    args = parse_arguments()
    base = make_base(args.base)
    settings = Settings(
        args.dtype, args.double_quant, args.checkpointing, args.rows, args.tokens, args.documents
    )
    print(f"{settings} on {DEVICE}\n")
    result: dict[str, Any] = {"settings": settings, "ranks": {}}
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
    write_result(f"step_vs_peft_{DEVICE.type}_{args.dtype}", result)


if __name__ == "__main__":
    main()
