"""CPU time that does not shrink with the model: Python of a layer, a dropout mask, the report.

    python benchmarks/fixed_costs.py [--steps 9] [--directory DIR]

``layer``   CPU milliseconds of a block and micro-batch: forward, recomputation and backward of 4
            and of 16 blocks of hidden size 64 on 32 tokens, whose difference leaves embedding,
            head, loss and optimizer out. PEFT's plain loop with bitsandbytes takes turns with it,
            and so do two floors: transformers' block with frozen bfloat16 weights and no adapter at
            all, and the same with the fewest operators of LoRA (two products and a sum a linear,
            bfloat16 factors, nothing decoded).
``calls``   operators that a block and micro-batch dispatches, those among them that wait for a
            device (``item``, ``nonzero``), and microseconds of one small operator: the product
            is what the block costs if everything but the operators were free.
``mask``    nanoseconds an element of a dropout mask [512, 4096], and of a generator's draw of it.
``report``  CPU seconds that the plots of a report of 500 steps take.

One thread; medians of ``--steps``. CPU seconds swell on a busy machine, so compare within a row.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, make_base, print_table, write_result
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dist_peft.app.model_setup import build_model, load_weights
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World
from dist_peft.data.loader import Batch
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout
from dist_peft.train.loop import TrainingStep
from dist_peft.train.objective import TokenObjective
from dist_peft.train.optimizers import make_optimizer_factory
from dist_peft.train.plots import PLOTS, draw_plot
from dist_peft.train.step_metrics import StepMetrics

CPU = torch.device("cpu")
TOKENS, FEW, MANY = 32, 4, 16
SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def measure_cpu(action: Callable[[], Any]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def make_own_micro_batch(base: Path, dropout: float) -> Callable[[], Any]:
    """Forward and backward of one micro-batch with this project's defaults."""
    config = parse_config(
        {
            "base": {"path": str(base), "quant": {"kind": "nf4"}},
            "adapter": {"kind": "lora", "r": 8, "dropout": dropout},
            "data": {"train": ["unused.jsonl"]},
            "train": {"device": "cpu", "steps": 1},
        }
    )
    built = load_weights(build_model(resolve_config(config)), World(), CPU)
    call = built.setup_optimizer(make_optimizer_factory(config.train, CPU))
    adapter = built.setup.adapter
    part = TrainingStep(built.model, call, built.engine, adapter, TokenObjective(), World())
    ids = torch.randint(3, 500, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, torch.roll(ids, -1, 1), torch.arange(TOKENS)[None], torch.tensor([0]))
    return lambda: part.accumulate_gradients(0, [batch], TOKENS)


def make_peft_micro_batch(base: Path, dropout: float) -> Callable[[], Any]:
    """The same of PEFT's layers on bitsandbytes' linears."""
    quant = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=quant, device_map={"": "cpu"}
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    lora = LoraConfig(r=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    ids = torch.randint(3, 500, (1, TOKENS), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        logits = model(input_ids=ids, use_cache=False).logits
        labels = torch.roll(ids, -1, 1).flatten()
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels).backward()

    return run


class BareLora(torch.nn.Module):
    """A frozen bfloat16 linear, its factors, and nothing else."""

    def __init__(self, linear: torch.nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)
        shapes = (rank, linear.in_features), (linear.out_features, rank)
        self.lora_A, self.lora_B = (
            torch.nn.Parameter(torch.full(shape, 0.01, dtype=torch.bfloat16)) for shape in shapes
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        linear = torch.nn.functional.linear
        return linear(x, self.weight) + linear(linear(x, self.lora_A), self.lora_B)


def make_floor_micro_batch(base: Path, *, has_factors: bool) -> Callable[[], Any]:
    """Forward, recomputation and backward of transformers' own blocks in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).train()
    model.requires_grad_(False).gradient_checkpointing_enable({"use_reentrant": False})
    if has_factors:
        for block in model.model.layers:
            for parent in (block.self_attn, block.mlp):
                for name, linear in list(parent.named_children()):
                    if isinstance(linear, torch.nn.Linear):
                        setattr(parent, name, BareLora(linear))
    ids = torch.randint(3, 500, (1, TOKENS), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        labels = torch.roll(ids, -1, 1).flatten()
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels).backward()

    return run


Sides = dict[str, dict[int, Callable[[], Any]]]
"""A micro-batch by side and number of blocks."""


def make_sides(directory: Path) -> Sides:
    bases = {n: make_base(directory / str(n), num_hidden_layers=n, **SIZES) for n in (FEW, MANY)}
    sides: Sides = {
        f"{name}, dropout {dropout:g}": {n: make(base, dropout) for n, base in bases.items()}
        for name, make in (("dist_peft", make_own_micro_batch), ("peft", make_peft_micro_batch))
        for dropout in (0.0, 0.05)
    }
    floors = {"frozen block alone": False, "with bare factors": True}
    return sides | {
        name: {n: make_floor_micro_batch(base, has_factors=has) for n, base in bases.items()}
        for name, has in floors.items()
    }


class CallCounter(TorchDispatchMode):
    """Counts operators; those that wait for a device apart."""

    waiting = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.waits = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        self.waits += func.overloadpacket.__name__ in self.waiting
        return func(*args, **(kwargs or {}))


def count_calls(sides: Sides) -> dict[str, dict[str, float]]:
    """Return operators a block and micro-batch, and waits of a whole micro-batch."""
    found = {}
    for name, runs in sides.items():
        counters = {n: CallCounter() for n in runs}
        for n, run in runs.items():
            with counters[n]:
                run()
        calls = (counters[MANY].calls - counters[FEW].calls) / (MANY - FEW)
        waits = (counters[MANY].waits - counters[FEW].waits) / (MANY - FEW)
        found[name] = {"calls": calls, "waits": waits, "waits_outside": counters[FEW].waits}
    return found


def measure_call(steps: int) -> dict[str, float]:
    """Return microseconds of small operators on [32, 64], bfloat16, of a view, and of a product
    with a factor [8, 64] in both types."""
    x, square = torch.ones(TOKENS, 64).bfloat16(), torch.ones(64, 64)
    factor, wide = torch.ones(64, 8).bfloat16(), (torch.ones(TOKENS, 64), torch.ones(64, 8))
    sides: dict[str, Callable[[], Any]] = {
        "mul": lambda: x.mul(x),
        "mm": lambda: square.mm(square),
        "view": lambda: x.view(64, 32),
        "factor, bfloat16": lambda: x.mm(factor),
        "factor, float32": lambda: wide[0].mm(wide[1]),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(steps + 1):
        for name, run in sides.items():
            times[name].append(measure_cpu(lambda run=run: [run() for _ in range(2000)]) * 500)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def measure_layer(sides: Sides, steps: int) -> dict[str, float]:
    """Return CPU milliseconds a block and micro-batch, side by side."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(steps + 2):
        for name, runs in sides.items():
            few, many = measure_cpu(runs[FEW]), measure_cpu(runs[MANY])
            if turn > 1:
                found[name].append(1000 * (many - few) / (MANY - FEW))
    return {name: statistics.median(times) for name, times in found.items()}


def measure_mask(steps: int) -> dict[str, float]:
    """Return nanoseconds an element."""
    x = torch.ones(1, 512, 4096)
    position = DropoutPosition(0)
    layer = SampleDropout(0.05, "a", position)
    position.begin_micro_batch(0, torch.tensor([0]))
    generator = torch.Generator()
    drawn = torch.empty(512, 4096, dtype=torch.bool)
    sides = {
        "hash": lambda: layer._keep_elements(x, layer.make_keys(x)),
        "generator": lambda: drawn.bernoulli_(0.05, generator=generator.manual_seed(0)),
    }
    pairs: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(steps):
        for name, run in sides.items():
            pairs[name].append(1e9 * measure_cpu(run) / drawn.numel())
    return {name: statistics.median(times) for name, times in pairs.items()}


def measure_report(steps: int) -> float:
    """Return CPU seconds of all plots of a report, after a first time (fonts)."""
    records = [
        StepMetrics(n, 2 - n / 500, 1e-4, 1 + n % 7 / 7, 1000, 5000 + n % 11, 2**30, 0)
        for n in range(1, 501)
    ]

    def draw() -> None:
        for plot in filter(lambda each: each.is_shown(records), PLOTS):
            draw_plot(plot, records)
            if plot.is_wide:
                draw_plot(plot, records, is_wide=True)

    draw()
    return statistics.median(measure_cpu(draw) for _ in range(steps))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--directory", type=Path, default=RESULTS, help="of the result")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        sides = make_sides(Path(scratch))
        layer, calls = measure_layer(sides, args.steps), count_calls(sides)
    call = measure_call(args.steps)
    mask, report = measure_mask(args.steps), measure_report(min(3, args.steps))
    rows = [[f"layer, {name}", f"{value:.2f} ms"] for name, value in layer.items()]
    rows += [
        [f"operators, {name}", f"{found['calls']:.0f}, {found['waits']:.0f} of them wait"]
        for name, found in calls.items()
    ]
    rows += [[f"one operator, {name}", f"{value:.2f} µs"] for name, value in call.items()]
    rows += [[f"mask, {name}", f"{value:.2f} ns an element"] for name, value in mask.items()]
    rows.append(["report", f"{report:.2f} s"])
    print_table(("what", "CPU"), rows)
    found = {
        "layer_ms": layer,
        "calls": calls,
        "call_us": call,
        "mask_ns": mask,
        "report_s": report,
    }
    write_result("fixed_costs", found, args.directory)


if __name__ == "__main__":
    main()
