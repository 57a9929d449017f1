r"""What each form of a trained adapter on an NF4 base is off, as a share of the adapter's effect.

    python benchmarks/export_error.py --base stories260K-hf --text tinystories_clean.jsonl
    python benchmarks/export_error.py --base stories260K-hf --text input.txt \
        --name tinyshakespeare --steps 40 --tokens 128

LoRA, PiSSA and LoftQ are trained for some steps on the same text and exported by the command line
in every form; its consumer (transformers, PEFT, bitsandbytes) gives the logits of the run's
held-out probe. The error is their root mean square distance to the trained model's, over that of
the model before training. All arithmetic is in float32.

    peft, original base        adapter/ put on the base as its files have it
    peft, base in 4 bits       adapter/ put on the base that bitsandbytes quantizes to NF4
    hf-bf16, original          dist-peft merge
    hf-bf16, decoded           dist-peft merge --base decoded
    bnb-nf4, merged            dist-peft export --format bnb-nf4
    bnb-nf4, kept              dist-peft export --format bnb-nf4 --keep-adapter

``weights`` is the figure that a run prints at its end: of PEFT's form on the original base, in the
weights instead of the logits. FILE is JSONL with a column ``text``, or a plain text, which is cut
into pieces of 1000 characters; the last 20 are held out.
A base whose MLP is no multiple of 64 wide (stories260K: 172) is widened with zeros, which changes
no logit, since bitsandbytes' blocks must divide a row.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, print_table, write_result
from omegaconf import OmegaConf
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)

from dist_peft.app import cli
from dist_peft.export.verify import Comparison, Probe, compare_logits, verify_directory
from dist_peft.export.verify_bitsandbytes import (
    patch_bitsandbytes_layers,
    verify_with_bitsandbytes,
)
from dist_peft.export.verify_formats import ConsumerRequest

INITS = {"LoRA": "default", "PiSSA": "pissa", "LoftQ": "loftq"}
EXPORTS: dict[str, tuple[str, ...]] = {
    "hf-bf16, original": ("merge",),
    "hf-bf16, decoded": ("merge", "--base", "decoded"),
    "bnb-nf4, merged": ("export", "--format", "bnb-nf4"),
    "bnb-nf4, kept": ("export", "--format", "bnb-nf4", "--keep-adapter"),
}
FORMS = ("peft, original base", "peft, base in 4 bits", *EXPORTS)
HELD_OUT = 20
PIECE = 1000


@dataclass(frozen=True)
class Measured:
    """One form of one run. ``error``, ``weights``: shares, see the module; ``kl`` in nats."""

    method: str
    seed: int
    form: str
    error: float
    kl: float
    kl_before: float
    top1: float
    weights: float | None


# -- base, text, run -----------------------------------------------------------------------------


def widened(base: Path, out: Path) -> Path:
    """The base with an MLP of a multiple of 64; new rows and columns are zeros.

    Raises:
        SystemExit: it computes something else.
    """
    config = AutoConfig.from_pretrained(base)
    config.intermediate_size = -(-config.intermediate_size // 64) * 64
    old = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    new = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    values = old.state_dict()
    with torch.no_grad():
        for name, target in new.state_dict().items():
            target.zero_()[tuple(slice(n) for n in values[name].shape)] = values[name]
        ids = torch.arange(3, 67).unsqueeze(0)
        torch.testing.assert_close(new(ids).logits, old(ids).logits, rtol=1e-4, atol=1e-4)
    new.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    GenerationConfig.from_pretrained(base).save_pretrained(out)
    return out


def documents(file: Path) -> list[str]:
    """Lines of JSON."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        return text.splitlines(keepends=True)
    pieces = [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
    return [json.dumps({"text": piece}) + "\n" for piece in pieces]


def train(args: argparse.Namespace, base: Path, scratch: Path, init: str, seed: int) -> Path:
    """One run; gives its directory."""
    run = scratch / f"{init}-{seed}"
    lines = documents(args.text)
    parts = {"train": lines[:-HELD_OUT], "eval": lines[-HELD_OUT:]}
    for name, part in parts.items():
        (scratch / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    tree = {
        "base": {"path": str(base), "quant": {"kind": "nf4"}, "compute_dtype": "float32"},
        "adapter": {"kind": "lora", "r": args.rank, "alpha": 2 * args.rank, "init": init},
        "data": {
            **{name: [str(scratch / f"{name}.jsonl")] for name in parts},
            "seq_len": args.tokens,
            "too_long": "truncate",
            "cache_dir": str(scratch / "cache"),
        },
        "train": {
            "steps": args.steps,
            "micro_batch": 4,
            "global_batch": 8,
            "lr": args.lr,
            "seed": seed,
            "device": "cpu",
        },
        "save": {"dir": str(run), "every": 0},
    }
    OmegaConf.save(OmegaConf.create(tree), scratch / "run.yaml")
    command("train", "--config", scratch / "run.yaml")
    return run


def command(*argv: object) -> None:
    code = cli.main([str(word) for word in argv])
    if code:
        raise SystemExit(f"dist-peft {argv[0]} ended with {code}")


# -- forms ---------------------------------------------------------------------------------------


@torch.no_grad()
def by_peft(base: Path, adapter: Path, probe: Probe, *, in_4_bits: bool) -> Comparison:
    """The adapter directory on the base as users load it."""
    options: dict[str, Any] = {"dtype": torch.float32, "device_map": "cpu"}
    if in_4_bits:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    if in_4_bits:
        patch_bitsandbytes_layers(model)
    adapted = PeftModel.from_pretrained(model, str(adapter)).eval()
    return compare_logits(adapted(input_ids=probe.input_ids, use_cache=False).logits.float(), probe)


def measure(form: str, base: Path, run: Path, scratch: Path) -> Comparison:
    probe = Probe.load_probe(run / "probe.safetensors")
    if form.startswith("peft"):
        return by_peft(base, run / "adapter", probe, in_4_bits=form.endswith("4 bits"))
    out = scratch / f"{run.name}-{FORMS.index(form)}"
    command(*EXPORTS[form], "--run", run, "--out", out, "--no-verify")
    if form.startswith("hf"):
        return verify_directory(out, probe, torch.float32)
    return verify_with_bitsandbytes(ConsumerRequest(out, probe, torch.float32))[1]


def measure_all(args: argparse.Namespace, scratch: Path) -> list[Measured]:
    base, results = widened(args.base, scratch / "base"), []
    for seed in args.seeds:
        for method, init in INITS.items():
            run = train(args, base, scratch, init, seed)
            about = json.loads((run / "adapter" / "dist_peft.json").read_text())
            for form in FORMS:
                found = measure(form, base, run, scratch)
                weights = about.get("peft_form", {}).get("error") if form == FORMS[0] else None
                numbers = (found.relative, found.kl, found.kl_before, found.top1, weights)
                results.append(Measured(method, seed, form, *numbers))
                print(results[-1], flush=True)
    return results


# -- output --------------------------------------------------------------------------------------


def table(results: list[Measured]) -> tuple[list[str], list[list[str]]]:
    """Mean over the seeds, with the smallest and largest in brackets."""
    rows = []
    for form in FORMS:
        own = [[r.error for r in results if (r.method, r.form) == (m, form)] for m in INITS]
        rows.append([form, *map(_spread, own)])
    shares = [
        [r.weights for r in results if r.method == m and r.weights is not None] for m in INITS
    ]
    rows.append(["peft, original base: weights", *map(_spread, shares)])
    return ["error, % of the adapter's effect", *INITS], rows


def _spread(shares: list[float]) -> str:
    if not shares:
        return "-"
    mean, low, high = (100 * v for v in (statistics.fmean(shares), min(shares), max(shares)))
    return f"{mean:.1f}" + (f" ({low:.1f} to {high:.1f})" if len(shares) > 1 else "")


def as_markdown(results: list[Measured], settings: dict[str, Any]) -> str:
    header, rows = table(results)
    lines = [header, ["---", *("---:" for _ in INITS)], *rows]
    return "\n".join(
        [
            "# Error of exported forms, NF4 base",
            "",
            ", ".join(f"{key} {value}" for key, value in machine().items()),
            "",
            ", ".join(f"{key} {value}" for key, value in settings.items()),
            "",
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="a pretrained causal LM")
    parser.add_argument("--text", type=Path, required=True, help="JSONL or plain text")
    parser.add_argument("--name", default="tinystories", help="of the text, in the results' names")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--tokens", type=int, default=256, help="of a row")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        write(measure_all(args, Path(scratch)), args)


def write(results: list[Measured], args: argparse.Namespace) -> None:
    settings = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    print_table(*table(results))
    name = f"export_error_{args.name}"
    write_result(name, {"settings": settings, "measured": results})
    (RESULTS / f"{name}.md").write_text(as_markdown(results, settings))


if __name__ == "__main__":
    main()
