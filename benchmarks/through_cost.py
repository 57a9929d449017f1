"""What a step through the quantizer costs: CPU seconds over those of plain LoRA on the same base.

    python benchmarks/through_cost.py [--steps 6] [--tokens 512] [--micro-batches 5] [--blocks 2]

A random Llama of hidden size 512; LoRA on all linears; one process, one thread, float32. Both sides
take turns, a step each, and a step has all of it: forward and backward of every micro-batch, the
update, and encoding all rows again. Shown are the median over pairs of the ratio, its range, and
the median CPU seconds of encoding. On N ranks each encodes 1/N of the rows; this is N = 1.
"""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, base_argument, make_base, print_table, run_processes, write_result
from method_cost import SIZES, Trainer

from dist_peft.adapters.lora.through_quantizer import update_rows
from dist_peft.compress.calibrated_base import FactorWriter
from dist_peft.core.config.io import parse_config
from dist_peft.core.config.run import BaseConfig
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.gptq_factors import FACTORS
from dist_peft.model.skeleton import build_skeleton
from dist_peft.quant.gptq import compute_gram, factorize_hessian
from dist_peft.train.importance import EngineParameters

NF4 = {"kind": "nf4", "double_quant": False}
CELLS: dict[str, tuple[dict[str, Any], int]] = {
    "nf4, r 16": (NF4, 16),
    "nf4, r 64": (NF4, 64),
    "int 4 bits, groups of 32, r 16": ({"kind": "int", "bits": 4, "group_size": 32}, 16),
    "int 2 bits, groups of 16, r 64": ({"kind": "int", "bits": 2, "group_size": 16}, 64),
    "int 4 bits, groups of 32, r 16, solver gptq": (
        {"kind": "int", "bits": 4, "group_size": 32, "solver": "gptq"},
        16,
    ),
}


def add_random_factors(base: Path, quant: dict[str, Any]) -> Path:
    """A copy of ``base`` with factors of random inputs, whose values do not change the cost."""
    out = base.with_name(f"{base.name}_factors")
    if (out / FACTORS).is_dir():
        return out
    shutil.copytree(base, out, dirs_exist_ok=True)
    section = BaseConfig.model_validate({"path": str(base), "quant": quant})
    writer = FactorWriter(out)
    for module in build_skeleton(section, base).model.modules():
        if isinstance(module, FrozenLinear) and module.codec.affine_rows is not None:
            x = torch.randn(2 * module.in_features, module.in_features)
            factor = factorize_hessian(compute_gram(x).double(), quant["group_size"])
            writer.write_factor([module.source], factor)
    writer.write_about(section, {})
    return out


class Side(Trainer):
    """A configuration ready to step on random tokens in several micro-batches."""

    def __init__(self, base: Path, cell: str, tokens: int, micro_batches: int, through: bool):
        quant, r = CELLS[cell]
        if through and "solver" in quant:
            base = add_random_factors(base, quant)
        elif "solver" in quant:  # plain LoRA decodes the same rows, however they were encoded
            quant = {key: value for key, value in quant.items() if key != "solver"}
        tree = {
            "base": {"path": str(base), "quant": quant, "compute_dtype": "float32"},
            "adapter": {"kind": "lora", "r": r, "alpha": 2 * r, "through_quantizer": through},
            "data": {"train": ["unused.jsonl"]},
            "train": {"precision": "fp32", "device": "cpu", "steps": 1000},
        }
        super().__init__(parse_config(tree), tokens)
        self.batches = [self.batch] * micro_batches

    def take_cpu_step(self) -> float:
        """CPU seconds of an optimizer step."""
        before = time.process_time()
        targets = sum(batch.labels.numel() for batch in self.batches)
        loss = self.part.accumulate_gradients(0, self.batches, targets)
        self.part.update_parameters(0, loss, 1e-4, 1.0)
        self.part.finish_step(1)
        return time.process_time() - before

    def encode_rows(self) -> float:
        """CPU seconds of encoding all rows again."""
        before = time.process_time()
        access = EngineParameters(self.built.model, self.built.engine)
        update_rows(self.built.setup.adapter.layers.items(), access)  # type: ignore[attr-defined]
        return time.process_time() - before


def measure_cell(
    base: Path, cell: str, tokens: int, micro_batches: int, steps: int
) -> dict[str, Any]:
    torch.set_num_threads(1)
    through, plain = (Side(base, cell, tokens, micro_batches, flag) for flag in (True, False))
    pairs = [(through.take_cpu_step(), plain.take_cpu_step()) for _ in range(steps + 1)][1:]
    ratios = [own / other for own, other in pairs]
    return {
        "cell": cell,
        "tokens": tokens * micro_batches,
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "plain_s": statistics.median(other for _, other in pairs),
        "encode_s": statistics.median(through.encode_rows() for _ in range(3)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    base_argument(parser)
    parser.add_argument("--steps", type=int, default=6, help="pairs that are counted")
    parser.add_argument("--tokens", type=int, default=512, help="of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=list(CELLS), default=list(CELLS))
    args = parser.parse_args()
    directory = args.base.with_name(f"{args.base.name}_512_{args.blocks}")
    base = make_base(directory, **SIZES, num_hidden_layers=args.blocks)
    file = RESULTS / "through_cost.json"
    known = json.loads(file.read_text())["result"] if file.is_file() else []
    rows = [row for row in known if row["cell"] not in args.only]
    for cell in args.only:
        job = (base, cell, args.tokens, args.micro_batches, args.steps)
        rows += run_processes(measure_cell, [job])
        print(rows[-1], flush=True)
        write_result("through_cost", rows)
    print_table(
        ("base", "tokens a step", "ratio", "of pairs", "plain, CPU s", "encoding, CPU s"),
        [
            [
                row["cell"],
                row["tokens"],
                f"{row['ratio']:.3f}",
                f"{row['lowest']:.3f} to {row['highest']:.3f}",
                f"{row['plain_s']:.2f}",
                f"{row['encode_s']:.3f}",
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
