"""Error of ``dist-peft switch`` against a direct merge or export of the other run.

    python benchmarks/switch_table.py --base DIR --text FILE --other FILE [--steps 20]

Two LoRA runs and two QA-LoRA runs are trained, one on each file. A merge of the first is switched
to the second and compared with a merge of the second, in three types; an export with float biases
is switched there and back and compared bit for bit.

error       of the weights: root mean square of switched - merged, over that of the second's change
logits      the same of the logits on the second run's probe, over the change by training
of a merge  the logits' error of the direct merge, which is rounded once
"""

import argparse
import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import print_table, write_result
from safetensors.torch import load_file

from dist_peft.app.commands.train import train_from_config
from dist_peft.app.task_switching import switch_tasks
from dist_peft.app.verified_export import export_finished_run, merge_finished_run
from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World
from dist_peft.export.verify import Probe, verify_directory

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]


@dataclass(frozen=True)
class Row:
    """One directory; ``logits`` and ``logits_of_merge`` are -1 where bits are compared."""

    form: str
    weights: float
    logits: float
    logits_of_merge: float
    back: str


def train_run(
    args: argparse.Namespace, scratch: Path, text: Path, name: str, **sections: Any
) -> Path:
    out = scratch / name
    tree = {
        "base": {"path": str(args.base), "compute_dtype": "float32", **sections.pop("base", {})},
        "data": {
            "train": [{"path": str(text), "format": "text"}],
            "seq_len": 128,
            "cache_dir": str(scratch / "cache"),
        },
        "train": {"steps": args.steps, "lr": args.lr, "global_batch": 8, "device": "cpu"},
        "save": {"dir": str(out), "every": 0},
        **sections,
    }
    assert train_from_config(parse_config(tree), World()) == 0
    return out


def hash_weights(directory: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def compare_weights(found: Path, direct: Path, base: Path) -> float:
    error = change = 0.0
    for file in sorted(direct.glob("*.safetensors")):
        ours, theirs = load_file(found / file.name), load_file(file)
        before = load_file(base / file.name)
        for name, value in theirs.items():
            error += float((ours[name].double() - value.double()).square().sum())
            change += float((value.double() - before[name].double()).square().sum())
    return (error / change) ** 0.5


def measure_merges(first: Path, second: Path, base: Path, scratch: Path) -> list[Row]:
    probe, rows = Probe.load_probe(second / "probe.safetensors"), []
    for dtype in ("float32", "bfloat16", "float16"):
        places = {name: scratch / f"{name} {dtype}" for name in ("a", "b", "ab", "aba", "base")}
        for run, name in ((first, "a"), (second, "b")):
            merge_finished_run(run, places[name], dtype=dtype, verify=None)
        switch_tasks(places["a"], first, second, places["ab"], verify=None)
        switch_tasks(places["ab"], second, first, places["aba"], verify=None)
        found, direct = (
            verify_directory(places[name], probe, torch.float32).relative for name in ("ab", "b")
        )
        back = compare_weights(places["aba"], places["a"], base)
        error = compare_weights(places["ab"], places["b"], base)
        rows.append(Row(f"merged, {dtype}", error, found, direct, f"{back:.1e}"))
    return rows


def measure_biases(first: Path, second: Path, scratch: Path) -> list[Row]:
    rows = []
    for form in ("hf-metal", "mlx"):
        places = {name: scratch / f"{form} {name}" for name in ("a", "b", "ab", "aba")}
        for run, name in ((first, "a"), (second, "b")):
            export_finished_run(run, form, places[name], {}, verify=None)
        switch_tasks(places["a"], first, second, places["ab"], verify=None)
        switch_tasks(places["ab"], second, first, places["aba"], verify=None)
        hashes = {name: hash_weights(place) for name, place in places.items()}
        assert hashes["ab"] == hashes["b"] and hashes["aba"] == hashes["a"] != hashes["b"]
        rows.append(Row(f"{form} of QA-LoRA, INT4", 0.0, -1.0, -1.0, "equal bits"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--other", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=5e-3)
    args = parser.parse_args()
    lora = {"base": {"quant": None}, "adapter": {"kind": "lora", "r": 8, "alpha": 16}}
    quant = {"kind": "int", "bits": 4, "group_size": 32}
    adapter = {"kind": "qalora", "r": 8, "alpha": 16, "target_modules": TARGETS}
    qalora = {"base": {"quant": quant}, "adapter": adapter}
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        runs = {
            name: [
                train_run(args, scratch, text, f"{name}{number}", **dict(sections))
                for number, text in enumerate((args.text, args.other))
            ]
            for name, sections in (("lora", lora), ("qalora", qalora))
        }
        rows = measure_merges(*runs["lora"], args.base, scratch)
        rows += measure_biases(*runs["qalora"], scratch)
    head = ("form", "weights", "logits", "of a merge", "there and back")
    cells = [
        (
            r.form,
            f"{r.weights:.1e}" if r.weights else "equal bits",
            *map(_show, (r.logits, r.logits_of_merge)),
            r.back,
        )
        for r in rows
    ]
    print_table(head, cells)
    write_result("switch_table", rows)


def _show_weights(row: Row) -> str:
    return f"{row.weights:.1e}" if row.weights else "equal bits"


def _show(share: float) -> str:
    return "" if share < 0 else f"{share:.2%}"


if __name__ == "__main__":
    main()
