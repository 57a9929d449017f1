r"""Error of every export format, as a share of the change by training.

    python benchmarks/export_formats.py --base stories260K-hf --text input.txt --tokens 128

Three runs are trained on pieces of the text: LoRA on an NF4 base, LoRA and QA-LoRA on a 4-bit base
in groups of 32 (QA-LoRA without ``down_proj``, whose 172 inputs 32 does not divide; formats leave
it dense). Each is exported in every form, which its own library loads to compute the logits of the
run's held-out probe. The error is their root mean square distance to the trained model's, over
that of the model before training. All arithmetic is in float32.

A form that refuses a run has no row; one whose library is not installed keeps the row of the
previous results, if there is one. MLX runs in the Python that DIST_PEFT_MLX_PYTHON names, gptqmodel
in that of DIST_PEFT_GPTQ_PYTHON. ``benchmarks/export_tables.py`` writes the table of
docs/export.md.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from common import RESULTS, write_result
from export_error import HELD_OUT, command, documents
from omegaconf import OmegaConf

from dist_peft.app.finished_run import load_finished_run
from dist_peft.core.errors import UserError
from dist_peft.export.formats.export_spec import ExportSpec
from dist_peft.export.formats.registry import FORMATS
from dist_peft.export.time_limit import VerificationSkipped
from dist_peft.export.verify import Probe
from dist_peft.export.verify_formats import ConsumerRequest

NAME = "export_formats"
NF4 = {"kind": "nf4"}
INT4 = {"kind": "int", "bits": 4, "group_size": 32}
WITHOUT_DOWN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LoRA, NF4 base": (NF4, {"kind": "lora"}),
    "LoRA, 4-bit base": (INT4, {"kind": "lora"}),
    "QA-LoRA, 4-bit base": (INT4, {"kind": "qalora", "target_modules": WITHOUT_DOWN}),
}
FORMS = (
    "hf-bf16",
    "hf-bf16 --base decoded",
    "peft",
    "peft-expanded",
    "bnb-nf4",
    "bnb-nf4 --base decoded",
    "bnb-nf4 --keep-adapter",
    "gptq",
    "compressed-tensors",
    "compressed-tensors --merge --lossy",
    "mlx",
    "mlx --bits 8 --base decoded",
    "hf-metal",
    "hf-metal --bits 8 --base decoded",
    "gguf --type q4_1",
    "gguf --type q8_0 --base decoded",
    "gguf --type f16 --base decoded",
)


@dataclass(frozen=True)
class Measured:
    """One form of one run. ``error``: a share, see the module."""

    run: str
    form: str
    error: float
    kl: float
    top1: float
    consumer: str


def train(args: argparse.Namespace, scratch: Path, name: str) -> Path:
    """Train one run and return its directory."""
    quant, adapter = RUNS[name]
    run = scratch / f"run-{list(RUNS).index(name)}"
    lines = documents(args.text)[: args.pieces + HELD_OUT]
    parts = {"train": lines[:-HELD_OUT], "eval": lines[-HELD_OUT:]}
    for part, text in parts.items():
        (scratch / f"{part}.jsonl").write_text("".join(text), encoding="utf-8")
    tree = {
        "base": {"path": str(args.base), "quant": quant, "compute_dtype": "float32"},
        "adapter": {"r": args.rank, "alpha": 2 * args.rank, **adapter},
        "data": {
            **{part: [str(scratch / f"{part}.jsonl")] for part in parts},
            "seq_len": args.tokens,
            "too_long": "truncate",
            "cache_dir": str(scratch / "cache"),
        },
        "train": {
            "steps": args.steps,
            "micro_batch": 4,
            "global_batch": 8,
            "lr": args.lr,
            "device": "cpu",
        },
        "save": {"dir": str(run), "every": 0},
    }
    OmegaConf.save(OmegaConf.create(tree), scratch / "run.yaml")
    command("train", "--config", scratch / "run.yaml")
    return run


def measure(name: str, run: Path, form: str, out: Path) -> Measured | None:
    """Export and load one form; None if it refuses the run or its library is not here."""
    format_name, *words = form.split()
    known, config = FORMATS[format_name], load_finished_run(run)
    options: dict[str, Any] = {}
    into: Literal["original", "decoded"] = "original"
    while words:
        word = words.pop(0).removeprefix("--")
        if word == "base":
            into = "decoded" if words.pop(0) == "decoded" else "original"
        elif words and not words[0].startswith("--"):
            value = words.pop(0)
            options[word.replace("-", "_")] = int(value) if value.isdecimal() else value
        else:
            options[word.replace("-", "_")] = True
    pooled = config.adapter.kind == "qalora"
    file = out / "model.gguf" if format_name == "gguf" else out
    job = ExportSpec(
        config.base, Path(config.base.path), run / "adapter", file, pooled, into, options
    )
    try:
        exported = known.write_export(job)
        probe = Probe.load_probe(run / "probe.safetensors")
        request = ConsumerRequest(exported.path, probe, job.compute_dtype)
        consumer, found = known.verify_export(job, request)
    except (UserError, VerificationSkipped) as error:
        print(f"{name}, {form}: {error}", flush=True)
        return None
    return Measured(name, form, found.relative, found.kl, found.top1, consumer)


def measure_all(args: argparse.Namespace, scratch: Path) -> list[Measured]:
    """Train the runs and measure all forms."""
    file = RESULTS / f"{NAME}.json"
    known = json.loads(file.read_text())["result"]["measured"] if file.is_file() else []
    before = {(row["run"], row["form"]): Measured(**row) for row in known}
    results = []
    for name in RUNS:
        run = train(args, scratch, name)
        for form in FORMS:
            out = scratch / f"{run.name}-{FORMS.index(form)}"
            found = measure(name, run, form, out) or before.get((name, form))
            if found is not None:
                results.append(found)
                print(found, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="a pretrained causal LM")
    parser.add_argument("--text", type=Path, required=True, help="JSONL or plain text")
    parser.add_argument("--pieces", type=int, default=300, help="training documents")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--tokens", type=int, default=256, help="of a row")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        results = measure_all(args, Path(scratch))
    settings = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    measured = [asdict(result) for result in results]
    write_result(NAME, {"settings": settings, "measured": measured})


if __name__ == "__main__":
    main()
