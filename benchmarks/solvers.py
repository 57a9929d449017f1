"""Perplexity of a pretrained base after rounding to nearest, HQQ and GPTQ, at 4, 3 and 2 bits.

    python benchmarks/solvers.py --base DIR --text FILE [--group-size 32] [--bits 4 3 2]

FILE is JSONL with a column ``text``, or a plain text. Its last fifth is held out: perplexity is
exp of the mean loss of its tokens, every document from its start. GPTQ is calibrated on the rest
and never sees the held-out part. Quantized are all linears of the blocks; embeddings and head stay
as they are. Arithmetic in float32.
"""

import argparse
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from common import print_table, write_result

from dist_peft.app.data_setup import make_data_loaders
from dist_peft.app.model_setup import build_model, load_weights
from dist_peft.app.quantized_base import load_calibration_sequences
from dist_peft.app.resolved_config import resolve_quantization
from dist_peft.compress.gptq_driver import solve_gptq_codes
from dist_peft.core.config.io import parse_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.world import World
from dist_peft.train.evaluate import evaluate_model

SOLVERS = ("rtn", "hqq", "gptq")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Measured:
    """One quantization; ``bits`` 16 and ``solver`` none: the base as it is."""

    bits: int
    solver: str
    loss: float
    perplexity: float
    seconds: float


def configuration(args: argparse.Namespace, scratch: Path, quant: dict | None) -> RunConfig:
    data = {
        "train": [{"path": str(scratch / f"calibration{args.text.suffix}"), "format": "text"}],
        "eval": [{"path": str(scratch / f"held_out{args.text.suffix}"), "format": "text"}],
        "seq_len": args.tokens,
        "packing": False,
        "cache_dir": str(scratch / "cache"),
    }
    base = {"path": str(args.base), "quant": quant, "compute_dtype": "float32"}
    train = {"micro_batch": 8, "device": DEVICE.type}
    return parse_config({"base": base, "adapter": {"kind": "none"}, "data": data, "train": train})


def split(text: Path, scratch: Path) -> None:
    """The last fifth of the lines is held out."""
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = len(lines) * 4 // 5
    for name, part in (("calibration", lines[:cut]), ("held_out", lines[cut:])):
        (scratch / f"{name}{text.suffix}").write_text("".join(part), encoding="utf-8")


def measure(config: RunConfig) -> Measured:
    world, quant = World(), config.base.quant
    prepared = build_model(resolve_quantization(config))
    begin = time.perf_counter()
    built = load_weights(prepared, world, DEVICE)
    if quant is not None and quant.solver == "gptq":
        sequences = load_calibration_sequences(prepared, world)
        solve_gptq_codes(prepared.skeleton, built.engine, sequences, world)
    seconds = time.perf_counter() - begin
    loaders = make_data_loaders(config, prepared.tokenizer, world)
    assert loaders.eval is not None
    objective, held_out = loaders.objective, loaders.eval
    loss = evaluate_model(built.model, built.engine, objective, held_out, world).loss
    bits, solver = (16, "none") if quant is None else (quant.bits, quant.solver)
    return Measured(bits, solver, loss, math.exp(loss), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="a pretrained model's directory")
    parser.add_argument("--text", type=Path, required=True, help="JSONL with text, or plain text")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--tokens", type=int, default=512, help="of a window")
    args = parser.parse_args()
    quants: list[dict | None] = [None]
    for bits in args.bits:
        for solver in SOLVERS:
            quant = {"kind": "int", "bits": bits, "group_size": args.group_size, "solver": solver}
            if solver == "gptq":
                quant["calibration_samples"] = args.samples
                quant["calibration_tokens"] = args.tokens
            quants.append(quant)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        split(args.text, Path(scratch))
        for quant in quants:
            results.append(measure(configuration(args, Path(scratch), quant)))
            print(results[-1], flush=True)
    found = {(r.bits, r.solver): r.perplexity for r in results}
    print(f"\nunquantized: {found[16, 'none']:.4f}\n")
    rows = [[b, *(f"{found[b, s]:.3f}" for s in SOLVERS)] for b in args.bits]
    print_table(["bits", *SOLVERS], rows)
    about = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    write_result(
        f"solvers_{args.base.name}_g{args.group_size}", {"options": about, "rows": results}
    )


if __name__ == "__main__":
    main()
