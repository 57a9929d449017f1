"""What each method costs on one base: parameters, memory and time of a training step.

    python benchmarks/method_cost.py [--base DIR] [--steps 5] [--tokens 256] [--only NAME ...]

The base is a random Llama of 26 M parameters (hidden 512, 8 blocks) in NF4, float32 arithmetic,
blocks recomputed in backward. A method is measured in two fresh processes of one thread:

    memory   all tensors between steps, and the private pages that a step adds at its peak
    time     the method and LoRA of rank 16 side by side, taking turns; the median of the ratios of
             neighbouring steps, since a machine's speed drifts

"Rests" counts the packed base, what learns and Adam's moments; the peak is what a step adds:
gradients, activations, decoded weights.
"""

import argparse
import ctypes
import gc
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    MIB,
    PeakMemory,
    base_argument,
    make_base,
    print_table,
    run_processes,
    write_result,
)

from dist_peft.adapters.directory import write_adapter_directory
from dist_peft.app.model_setup import build_model, load_weights
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.host_memory import return_freed_memory
from dist_peft.core.world import World
from dist_peft.data.loader import Batch
from dist_peft.train.loop import TrainingStep
from dist_peft.train.objective import TokenObjective
from dist_peft.train.optimizers import make_optimizer_factory

CPU = torch.device("cpu")
SIZES = {"hidden_size": 512, "intermediate_size": 1408, "vocab_size": 2048}

METHODS: dict[str, dict[str, Any]] = {
    "lora, r 16": {"kind": "lora", "r": 16},
    "lora, r 16, dora": {"kind": "lora", "r": 16, "use_dora": True},
    "qalora, r 16": {"kind": "qalora", "r": 16},
    "adalora, 12 to 8": {"kind": "adalora"},
    "vera, r 256": {"kind": "vera"},
    "loha, r 8": {"kind": "loha"},
    "lokr, r 8": {"kind": "lokr"},
    "bottleneck, pfeiffer": {"kind": "bottleneck"},
    "bottleneck, houlsby": {"kind": "bottleneck", "placement": "houlsby"},
    "bottleneck, parallel": {"kind": "bottleneck", "placement": "parallel"},
    "fusion of 2": {"kind": "fusion"},
    "fusion of 4": {"kind": "fusion"},
    "prefix, 20": {"kind": "prefix"},
    "prefix, 20, direct": {"kind": "prefix", "projection": False},
    "ptuning, 20, mlp": {"kind": "ptuning"},
    "ptuning, 20, lstm": {"kind": "ptuning", "encoder": "lstm"},
    "prompt, 20": {"kind": "prompt"},
    "partial, norms": {"kind": "partial", "parts": ["norms"]},
    "partial, last block": {"kind": "partial", "last_blocks": 1},
    "full": {"kind": "full"},
}
"""QA-LoRA stands on INT4 of the same group size."""


@dataclass(frozen=True)
class Cost:
    """Bytes, but for ``parameters`` (values that learn) and ``ratio`` (time of a step, LoRA 1)."""

    method: str
    parameters: int
    rests: int
    step_peak: int
    ratio: float
    seconds: float

    def row(self) -> list[object]:
        return [
            self.method,
            f"{self.parameters:,}",
            self.rests / MIB,
            self.step_peak / MIB,
            f"{self.ratio:.2f}",
            f"{self.seconds:.2f}",
        ]


HEADER = ("method", "parameters", "rests MiB", "peak of a step MiB", "time, LoRA 1", "seconds")


def config_of(base: Path, section: dict[str, Any]) -> RunConfig:
    integer = {"kind": "int", "bits": 4, "group_size": 64}
    return parse_config(
        {
            "base": {
                "path": str(base),
                "quant": integer if section["kind"] == "qalora" else {"kind": "nf4"},
                "compute_dtype": "float32",
            },
            "adapter": section,
            "data": {"train": ["unused.jsonl"]},
            "train": {"precision": "fp32", "device": "cpu", "steps": 1},
        }
    )


def stage1(base: Path, directory: Path, count: int) -> list[str]:
    """Bottleneck adapters, untrained, for AdapterFusion: their values do not change its cost."""
    config = config_of(base, METHODS["bottleneck, pfeiffer"])
    paths = []
    for number in range(count):
        seeded = config.model_copy(
            update={"train": config.train.model_copy(update={"seed": number})}
        )
        built = load_weights(build_model(resolve_config(seeded)), World(), CPU)
        path = directory / f"task{number}"
        public = built.setup.adapter.to_public_adapter(built.gather_adapter(), str(base))
        write_adapter_directory(path, public, {})
        paths.append(str(path))
    return paths


class Trainer:
    """A method ready to step on random tokens."""

    def __init__(self, config: RunConfig, tokens: int) -> None:
        world = World()
        self.built = built = load_weights(build_model(resolve_config(config)), world, CPU)
        call = built.setup_optimizer(make_optimizer_factory(config.train, CPU))
        self.part = TrainingStep(
            built.model, call, built.engine, built.setup.adapter, TokenObjective(), world
        )
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 2000, (1, tokens), generator=generator)
        labels = torch.roll(ids, -1, 1)
        self.batch = Batch(ids, labels, torch.arange(tokens)[None], torch.tensor([0]))

    def step(self) -> float:
        """Seconds of one optimizer step."""
        start = time.perf_counter()
        loss = self.part.accumulate_gradients(0, [self.batch], self.batch.labels.numel())
        self.part.update_parameters(0, loss, 1e-4, 1.0)
        return time.perf_counter() - start


def at_rest_and_peak(base: Path, section: dict[str, Any], tokens: int) -> tuple[int, int, int]:
    """Values that learn; bytes of all tensors at rest; the peak above that in steps."""
    torch.set_num_threads(1)
    trainer = Trainer(config_of(base, section), tokens)
    trainer.step()  # makes the moments
    gc.collect()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if issubclass(type(t), torch.Tensor) and t.device.type == "cpu"
    }
    with return_freed_memory():  # else pages of an earlier temporary hide a later one
        trainer.step()
        ctypes.CDLL(None).malloc_trim(0)  # glibc: also those of before
        with PeakMemory() as memory:
            trainer.step()
    peak = memory.anonymous - memory.before.anonymous
    return trainer.built.trained, sum(storages.values()), peak


def times(base: Path, section: dict[str, Any], tokens: int, steps: int) -> tuple[float, float]:
    """Median over steps of (this method's time / LoRA's), and this method's median in seconds."""
    torch.set_num_threads(1)
    method, lora = (Trainer(config_of(base, s), tokens) for s in (section, METHODS["lora, r 16"]))
    pairs = [(method.step(), lora.step()) for _ in range(steps + 1)][1:]
    return (
        statistics.median(own / other for own, other in pairs),
        statistics.median(own for own, _ in pairs),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    base_argument(parser)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    args = parser.parse_args()
    base = make_base(args.base.with_name(f"{args.base.name}_512"), **SIZES)
    results: list[Cost] = []
    with tempfile.TemporaryDirectory() as scratch:
        adapters = stage1(base, Path(scratch), 4)
        for name in args.only:
            section = dict(METHODS[name])
            if section["kind"] == "fusion":
                section["adapters"] = adapters[: int(name.split()[-1])]
            memory = run_processes(at_rest_and_peak, [(base, section, args.tokens)])[0]
            ratio, seconds = run_processes(times, [(base, section, args.tokens, args.steps)])[0]
            results.append(Cost(name, *memory, ratio, seconds))
            print(results[-1], flush=True)
    print_table(HEADER, [cost.row() for cost in results])
    write_result("method_cost", results)


if __name__ == "__main__":
    main()
