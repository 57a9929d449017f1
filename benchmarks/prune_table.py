"""Perplexity of a pretrained base after pruning, by method and sparsity, and written blocks.

    python benchmarks/prune_table.py --base DIR --text FILE [--sparsity 0.3 0.5 0.7 2:4]

FILE is JSONL with a column ``text``, or a plain text. Its last fifth is held out: perplexity is
exp of the mean loss of its tokens, every document from its start. Wanda, SparseGPT and block
influence are calibrated on the rest and never see the held-out part. Every number comes from the
directory that ``dist-peft prune`` writes, loaded as a base. Arithmetic in float32.
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
from dist_peft.app.pruning import PruningOptions, prune_base
from dist_peft.app.resolved_config import resolve_quantization
from dist_peft.compress.calibration import CalibrationSize
from dist_peft.core.config.io import parse_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.world import World
from dist_peft.quant.sparsity import Sparsity
from dist_peft.train.evaluate import evaluate_model

METHODS = ("magnitude", "wanda", "sparsegpt")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Measured:
    """One pruned base; ``method`` dense: the base as it is.

    ``zeros``: share of zeros in the blocks' linears. ``seconds``: of pruning, processor time.
    """

    method: str
    sparsity: str
    zeros: float
    loss: float
    perplexity: float
    seconds: float


def make_config(args: argparse.Namespace, scratch: Path, base: Path) -> RunConfig:
    data = {
        "train": [{"path": str(scratch / f"calibration{args.text.suffix}"), "format": "text"}],
        "eval": [{"path": str(scratch / f"held_out{args.text.suffix}"), "format": "text"}],
        "seq_len": args.tokens,
        "packing": False,
        "cache_dir": str(scratch / "cache"),
    }
    section = {"path": str(base), "quant": None, "compute_dtype": "float32"}
    train = {"micro_batch": 8, "device": DEVICE.type}
    return parse_config(
        {"base": section, "adapter": {"kind": "none"}, "data": data, "train": train}
    )


def split_text(text: Path, scratch: Path) -> None:
    """The last fifth of the lines is held out."""
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = len(lines) * 4 // 5
    for name, part in (("calibration", lines[:cut]), ("held_out", lines[cut:])):
        (scratch / f"{name}{text.suffix}").write_text("".join(part), encoding="utf-8")


def evaluate_base(config: RunConfig) -> tuple[float, float]:
    """Return the held-out loss, and the share of zeros in the blocks' linears."""
    world = World()
    setup = build_model(resolve_quantization(config))
    built = load_weights(setup, world, DEVICE)
    loaders = make_data_loaders(config, setup.tokenizer, world)
    assert loaders.eval is not None
    loss = evaluate_model(built.model, built.engine, loaders.objective, loaders.eval, world).loss
    packed = [p for name, p in built.model.named_parameters() if name.endswith("_proj.packed")]
    zeros = sum(int((p.view(torch.float32) == 0).sum()) for p in packed)
    return loss, zeros / sum(p.view(torch.float32).numel() for p in packed)


def measure(args: argparse.Namespace, scratch: Path, method: str, sparsity: str) -> Measured:
    base, seconds = args.base, 0.0
    if method != "dense":
        base = scratch / f"{method}-{sparsity}".replace(":", "-")
        size = CalibrationSize(args.samples, args.tokens, "--calibration-")
        options = PruningOptions(method, Sparsity.parse(sparsity), size)
        begin = time.process_time()
        prune_base(make_config(args, scratch, args.base), options, base, World(), DEVICE)
        seconds = time.process_time() - begin
    loss, zeros = evaluate_base(make_config(args, scratch, base))
    return Measured(method, sparsity, zeros, loss, math.exp(loss), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="a pretrained model's directory")
    parser.add_argument("--text", type=Path, required=True, help="JSONL with text, or plain text")
    parser.add_argument("--sparsity", nargs="+", default=["0.3", "0.5", "0.7", "2:4"])
    parser.add_argument("--blocks", nargs="+", default=["0.2", "0.4"], help="shares of blocks")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--tokens", type=int, default=512, help="of a window")
    args = parser.parse_args()
    wanted = [("dense", "0")]
    wanted += [(method, sparsity) for sparsity in args.sparsity for method in METHODS]
    wanted += [("blocks", sparsity) for sparsity in args.blocks]
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        split_text(args.text, Path(scratch))
        for method, sparsity in wanted:
            results.append(measure(args, Path(scratch), method, sparsity))
            print(results[-1], flush=True)
    found = {(r.sparsity, r.method): f"{r.perplexity:.3f}" for r in results}
    print(f"\ndense: {found['0', 'dense']}\n")
    print_table(
        ["sparsity", *METHODS], [[s, *(found[s, m] for m in METHODS)] for s in args.sparsity]
    )
    print()
    print_table(["blocks dropped", "perplexity"], [[s, found[s, "blocks"]] for s in args.blocks])
    about = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    write_result(f"prune_{args.base.name}", {"options": about, "rows": results})


if __name__ == "__main__":
    main()
