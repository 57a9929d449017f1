"""Training steps of a full-width model with random weights: speed, peak memory, plan.

Sides, one after the other in this process, each with LoRA of rank 16 on all linears, packed rows of
2048 tokens, four micro-batches a step, recomputation of blocks:

    nf4     this project, NF4 with double quantization
    bf16    this project, an unquantized base
    peft    PEFT and bitsandbytes in a plain loop, the same shapes and settings

Tokens a second are the median of the steps after the first two. Peaks are PyTorch's, allocated and
reserved; ``plan`` is what ``dist-peft plan`` computes for the same configuration beforehand.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import run_config, run_processes
from gpu_common import finish, parse_arguments, pick_device
from random_base import BASES, SIZES, TINY, build_random_model, make_packed_batch, shrink_base

from dist_peft.core.config.run import RunConfig
from dist_peft.plan.cluster import Cluster
from dist_peft.plan.planned_model import build_planned_model
from dist_peft.plan.run_plan import plan_run

MICRO_BATCHES = 4
LR = 1e-4


def make_config(side: str, length: int) -> RunConfig:
    quant = None if side == "bf16" else {"kind": "nf4", "double_quant": True}
    return run_config(
        Path("random"),
        base={"quant": quant, "compute_dtype": "bfloat16"},
        engine={"kind": "single", "activation_checkpointing": True},
        train={"global_batch": MICRO_BATCHES, "lr": LR},
        data={"train": ["unused.jsonl"], "seq_len": length, "packing": True},
    )


def plan(side: str, base: Path, length: int, memory: int, device: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        planned = build_planned_model(make_config(side, length), base, Path(scratch))
        found = plan_run(planned, Cluster(1, 1, memory), device_type=device)
    tree = found.to_json()
    return {"allocated": tree["memory"]["allocated"], "total": tree["memory"]["total"]}


def build_own(side: str, base: Path, length: int, device: torch.device) -> Callable[[int], float]:
    with tempfile.TemporaryDirectory() as scratch:
        model = build_random_model(make_config(side, length), base, Path(scratch), device)
    vocabulary = model.model.config.vocab_size

    def step(index: int) -> float:
        batches = [
            make_packed_batch(length, vocabulary, MICRO_BATCHES * index + i)
            for i in range(MICRO_BATCHES)
        ]
        targets = sum(int((batch.labels >= 0).sum()) for batch in batches)
        return model.take_step(index, batches, targets)

    return step


def build_peft(base: Path, length: int, device: torch.device) -> Callable[[int], float]:
    """Blocks are made and quantized one after the other, so that the dense model is never whole."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            made = Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            weight = torch.randn(module.out_features, module.in_features) * 0.02
            made.weight = Params4bit(
                weight.bfloat16(), requires_grad=False, quant_type="nf4", compress_statistics=True
            ).to(device)
            model.set_submodule(path, made)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.randn(parameter.shape, dtype=torch.bfloat16, device=device) * 0.02
                value = torch.ones_like(value) if value.dim() == 1 else value
                module.register_parameter(name, torch.nn.Parameter(value, False))
    rotary = type(model.model.rotary_emb)(config).to(device)  # its buffers were on meta
    model.model.rotary_emb = rotary
    model.gradient_checkpointing_enable({"use_reentrant": False})
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)

    def step(index: int) -> float:
        total = 0.0
        for i in range(MICRO_BATCHES):
            batch = make_packed_batch(length, config.vocab_size, MICRO_BATCHES * index + i)
            ids, places = batch.input_ids.to(device), batch.position_ids.to(device)
            logits = model(input_ids=ids, position_ids=places, use_cache=False).logits
            labels = batch.labels.to(device).flatten()
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels)
            (loss / MICRO_BATCHES).backward()
            total += loss.item() / MICRO_BATCHES
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def measure(
    build: Callable[[], Callable[[int], float]], steps: int, length: int, device: torch.device
) -> dict[str, Any]:
    """Losses, seconds a step, tokens a second and peaks of one side; its memory is freed."""
    cuda = device.type == "cuda"
    start = time.perf_counter()
    step = build()
    built = time.perf_counter() - start
    rests = torch.cuda.memory_allocated() if cuda else None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    losses, seconds = [], []
    for index in range(steps):
        start = time.perf_counter()
        losses.append(step(index))
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    found = {
        "losses": losses,
        "seconds_to_build": built,
        "seconds": seconds,
        "tokens_per_s": MICRO_BATCHES * length / statistics.median(seconds[2:]),
        "rests": rests,
        "peak_allocated": torch.cuda.max_memory_allocated() if cuda else None,
        "peak_reserved": torch.cuda.max_memory_reserved() if cuda else None,
    }
    del step
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return found


def main() -> None:
    def add(parser: Any) -> None:
        parser.add_argument("--base", default="llama-3.1-8b", help="of configs/bases, or of SIZES")
        parser.add_argument("--sides", nargs="+", default=["nf4"], choices=["nf4", "bf16", "peft"])
        parser.add_argument("--length", type=int, default=2048)
        parser.add_argument("--steps", type=int, default=8)

    args = parse_arguments(__doc__, add)
    device = pick_device(args)
    length, steps = (64, 4) if args.dry_run else (args.length, args.steps)
    failures: list[str] = []
    sides: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = BASES / f"{args.base}.json"
        if args.dry_run or args.base in SIZES:
            sizes = TINY if args.dry_run else SIZES[args.base]
            base = shrink_base(sizes, Path(scratch) / "config.json")
        cuda = device.type == "cuda"
        memory = torch.cuda.get_device_properties(0).total_memory if cuda else 80 * 2**30
        for side in args.sides:
            try:
                made: Callable[[], Callable[[int], float]]
                if side == "peft":
                    made = lambda: build_peft(base, length, device)  # noqa: E731
                    sides[side] = {}
                else:
                    made = lambda own=side: build_own(own, base, length, device)  # noqa: E731
                    # in a process of its own: tracing leaves no cached tensors here
                    job = (side, base, length, memory, device.type)
                    sides[side] = {"plan": run_processes(plan, [job])[0]}
                sides[side] |= measure(made, steps, length, device)
            except Exception as error:  # one side does not stop the others
                sides.setdefault(side, {})["error"] = f"{type(error).__name__}: {error}"
                failures.append(f"{side}: {sides[side]['error']}")
                continue
            if any(not 0 < loss < 100 for loss in sides[side]["losses"]):
                failures.append(f"{side}: losses {sides[side]['losses']}")
    result = {"base": args.base, "length": length, "sides": sides}
    finish(f"shape-{args.base.rpartition('-')[2]}", args, result, failures)


if __name__ == "__main__":
    main()
