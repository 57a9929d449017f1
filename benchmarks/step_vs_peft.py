"""One training step here and in PEFT + bitsandbytes: same base, adapter start, batches, optimizer.

    python benchmarks/step_vs_peft.py [--steps 3] [--dtype float32|bfloat16] [--double-quant]
        [--checkpointing]

Both models are in one process and take turns, so that whatever else the machine does meets both.
Peak memory is measured with one model a process. LoRA (r=16, all linears) computes in float32, as
PEFT's does beside a 4-bit base. Without double quantization both hold the same NF4 bytes and
scales, so the losses agree up to rounding; with it, scales are rounded in two different ways.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    MIB,
    Memory,
    PeakMemory,
    base_argument,
    make_base,
    print_table,
    run_config,
    run_processes,
    write_result,
)
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dist_peft.app.model_setup import build_model, load_weights
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.world import World
from dist_peft.data.loader import Batch
from dist_peft.train.loop import TrainingStep
from dist_peft.train.objective import TokenObjective
from dist_peft.train.optimizers import make_optimizer_factory

BATCH, SEQUENCE, LR = 2, 256, 1e-3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Step = Callable[[Batch], float]
"""Forward, backward, update; gives the mean loss before the update."""


@dataclass(frozen=True)
class Settings:
    dtype: str
    double_quant: bool
    checkpointing: bool


def ours(base: Path, settings: Settings) -> tuple[Any, Step]:
    config = run_config(
        base,
        base={
            "quant": {"kind": "nf4", "double_quant": settings.double_quant},
            "compute_dtype": settings.dtype,
        },
        engine={"kind": "single", "activation_checkpointing": settings.checkpointing},
        train={"lr": LR, "precision": "fp32"},
    )
    world = World()
    built = load_weights(build_model(resolve_config(config)), world, DEVICE)
    adapter = built.setup.adapter
    call = built.engine.setup_optimizer(
        built.model, make_optimizer_factory(config.train, DEVICE), adapter.get_lr_scale
    )
    part = TrainingStep(built.model, call, built.engine, adapter, TokenObjective(), world)

    def step(batch: Batch) -> float:
        loss = part.accumulate_gradients(0, [batch], batch.labels.numel())
        part.update_parameters(0, loss, LR, 1.0)
        return loss

    return built.model, step


def with_peft(base: Path, settings: Settings) -> tuple[Any, Step]:
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
    model = get_peft_model(model, lora).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)

    def step(batch: Batch) -> float:
        logits = model(input_ids=batch.input_ids.to(DEVICE), use_cache=False).logits
        labels = batch.labels.to(DEVICE).flatten()
        loss = functional.cross_entropy(logits.float().flatten(0, 1), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return model, step


SIDES = {"dist_peft": ours, "peft + bitsandbytes": with_peft}


def copy_start(source: Any, target: Any) -> None:
    """Give PEFT's LoRA the start values of ours."""
    start = {n: p.detach() for n, p in source.named_parameters() if p.requires_grad}
    for name, parameter in target.named_parameters():
        if parameter.requires_grad:
            own = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            parameter.data.copy_(start.pop(own))
    assert not start, f"without a partner: {list(start)[:3]}"


def make_batch(index: int) -> Batch:
    """Random tokens, two rows that repeat every second step so that the loss falls."""
    generator = torch.Generator().manual_seed(index % 2)
    rows = torch.randint(3, 32000, (BATCH, SEQUENCE + 1), generator=generator)
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    return Batch(rows[:, :-1], rows[:, 1:], positions, torch.arange(BATCH))


def timed(step: Step, batch: Batch) -> tuple[float, float]:
    """(loss, seconds); reading the loss waits for the device."""
    start = time.perf_counter()
    loss = step(batch)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return loss, time.perf_counter() - start


def alternate(base: Path, settings: Settings, steps: int) -> dict[str, list[tuple[float, float]]]:
    """(loss, seconds) of each step of each side; step 0 warms up and is left out of speeds."""
    built = {name: build(base, settings) for name, build in SIDES.items()}
    copy_start(*(model for model, _ in built.values()))
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in SIDES}
    for index in range(steps):
        batch = make_batch(index)
        for name, (_, step) in built.items():
            results[name].append(timed(step, batch))
    return results


def memory_of(name: str, base: Path, settings: Settings) -> dict[str, int]:
    """Bytes above the process before: peak while building, what rests, peak in two steps."""
    torch.set_num_threads(1)
    empty = Memory.now()
    with PeakMemory() as building:
        _, step = SIDES[name](base, settings)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with PeakMemory() as stepping:
        for index in range(2):
            step(make_batch(index))
    return {
        "build_peak": building.resident - empty.resident,
        "rests": building.after.anonymous - empty.anonymous,
        "step_peak": stepping.resident - empty.resident,
        "step_peak_anonymous": stepping.anonymous - empty.anonymous,
        "cuda_step_peak": torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    base_argument(parser)
    parser.add_argument("--steps", type=int, default=3, help="of each side; the first is not timed")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--double-quant", action="store_true")
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks, both sides")
    args = parser.parse_args()
    base = make_base(args.base)
    settings = Settings(args.dtype, args.double_quant, args.checkpointing)
    print(f"{settings} on {DEVICE}, batch {BATCH} x {SEQUENCE}\n")
    (steps,) = run_processes(alternate, [(base, settings, args.steps)])
    losses = [[f"{loss:.6f}" for loss, _ in each] for each in steps.values()]
    print_table(("loss", *SIDES), [(i, *pair) for i, pair in enumerate(zip(*losses, strict=True))])
    speed = {
        name: BATCH * SEQUENCE / statistics.median(seconds for _, seconds in each[1:])
        for name, each in steps.items()
    }
    shown = ", ".join(f"{name} {value:.1f}" for name, value in speed.items())
    ratio = speed["dist_peft"] / speed["peft + bitsandbytes"]
    print(f"\ntokens/s, median after step 0: {shown}; ratio {ratio:.2f}\n", flush=True)
    memory = {name: run_processes(memory_of, [(name, base, settings)])[0] for name in SIDES}
    print_table(
        ("MiB above empty", *memory["dist_peft"]),
        [(name, *(count / MIB for count in memory[name].values())) for name in SIDES],
    )
    name = f"step_vs_peft_{DEVICE.type}_{args.dtype}" + ("_double_quant" * args.double_quant)
    write_result(name, {"settings": settings, "steps": steps, "speed": speed, "memory": memory})


if __name__ == "__main__":
    main()
