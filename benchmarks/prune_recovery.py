"""LoRA on pruned bases: how much it recovers, and how much a merge that keeps the zeros loses.

    python benchmarks/prune_recovery.py --base DIR --text FILE [--sparsity 0.5 2:4]

SparseGPT prunes the base, and LoRA on all linears is trained on the text that is not held out, as
ever and with ``adapter.keep_zeros``. The first run is merged into all weights and with
``--keep-zeros``, the second as it was trained. Perplexity on the last fifth of the lines, as in
``prune_table.py``; errors are those that ``dist-peft merge`` reports. Float32.
"""

import argparse
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from common import print_table, write_result
from prune_table import DEVICE, evaluate_base, make_config, split_text

from dist_peft.app.commands.train import train_from_config
from dist_peft.app.pruning import PruningOptions, prune_base
from dist_peft.app.verified_export import VerificationOptions, merge_finished_run
from dist_peft.compress.calibration import CalibrationSize
from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World
from dist_peft.quant.sparsity import Sparsity


@dataclass(frozen=True)
class Recovered:
    """Perplexities of one sparsity, and the share of zeros in the blocks' linears of each merge.

    ``plain_seconds``, ``sparse_seconds``: processor time of the two trainings.
    """

    sparsity: str
    pruned: float
    merged: float
    merged_zeros: float
    kept: float
    kept_zeros: float
    trained: float
    trained_zeros: float
    plain_seconds: float
    sparse_seconds: float


def measure(args: argparse.Namespace, scratch: Path, sparsity: str) -> Recovered:
    name = sparsity.replace(":", "-")
    base = scratch / f"base-{name}"
    size = CalibrationSize(args.samples, args.tokens, "--calibration-")
    options = PruningOptions("sparsegpt", Sparsity.parse(sparsity), size)
    prune_base(make_config(args, scratch, args.base), options, base, World(), DEVICE)
    seconds = [train_run(args, scratch, base, name, keep_zeros) for keep_zeros in (False, True)]
    found = [math.exp(evaluate_base(make_config(args, scratch, base))[0])]
    for trained, cut in ((False, False), (False, True), (True, False)):
        out = scratch / f"merged-{name}-{trained}-{cut}"
        verify = VerificationOptions(max_error=10.0)  # the error is reported, whatever it is
        run = scratch / f"run-{name}-{trained}"
        merge_finished_run(run, out, dtype="float32", keep_zeros=cut, verify=verify)
        loss, zeros = evaluate_base(make_config(args, scratch, out))
        found += [math.exp(loss), zeros]
    return Recovered(sparsity, *found, *seconds)


def train_run(
    args: argparse.Namespace, scratch: Path, base: Path, name: str, keep_zeros: bool
) -> float:
    """Train on a pruned base; return the processor seconds."""
    tree = make_config(args, scratch, base).model_dump(mode="json")
    tree["data"]["eval"], tree["data"]["packing"] = [], True
    tree["data"]["loss_on"] = "all"
    adapter = {"kind": "lora", "r": args.rank, "alpha": 2 * args.rank, "keep_zeros": keep_zeros}
    tree |= {
        "adapter": adapter,
        "train": {"steps": args.steps, "lr": args.lr, "global_batch": 16, "micro_batch": 16},
        "save": {"dir": str(scratch / f"run-{name}-{keep_zeros}"), "every": 0},
    }
    begin = time.process_time()
    assert train_from_config(parse_config(tree), World()) == 0
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="a pretrained model's directory")
    parser.add_argument("--text", type=Path, required=True, help="JSONL with text, or plain text")
    parser.add_argument("--sparsity", nargs="+", default=["0.5", "2:4"])
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--tokens", type=int, default=256, help="of a window and of a sequence")
    parser.add_argument("--steps", type=int, default=60, help="of training")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        split_text(args.text, Path(scratch))
        results = [measure(args, Path(scratch), sparsity) for sparsity in args.sparsity]
    rows = [
        [
            r.sparsity,
            *(f"{value:.3f}" for value in (r.pruned, r.merged, r.kept, r.trained)),
            f"{r.kept_zeros:.1%} and {r.trained_zeros:.1%}",
            f"{r.sparse_seconds / r.plain_seconds:.2f}",
        ]
        for r in results
    ]
    heads = ["sparsity", "pruned", "LoRA, merged", "merged, zeros kept", "trained, zeros kept"]
    print_table([*heads, "zeros of the last two", "time"], rows)
    about = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    write_result(f"prune_recovery_{args.base.name}", {"options": about, "rows": results})


if __name__ == "__main__":
    main()
