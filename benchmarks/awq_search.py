r"""Perplexity of AWQ exports with and without the search of factors (``--calibration``).

    python benchmarks/awq_search.py --base stories260K-hf --text tinystories_clean.jsonl

LoRA is trained for some steps on a base without quantization, and the run exported as ``awq`` in
groups of 64 and 32, rounded to nearest and with factors searched on the training texts. Perplexity
is that of the last 200 texts, which are in neither, computed in float32 with the weights that the
directory holds; ``merged`` is the model before rounding. The MLP of stories260K is widened from 172
to 192 with zeros, so that groups divide it.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, print_table, write_result
from export_error import command, documents, widened
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from dist_peft.core.config.run import BaseConfig
from dist_peft.engine.single import SingleEngine
from dist_peft.model.hub import read_json_object
from dist_peft.model.load import load_model
from dist_peft.model.skeleton import build_skeleton
from dist_peft.store.reader import RowReader

HELD_OUT, TOKENS = 200, 256
NONE: dict[str, Any] = {"quant": None}


@torch.no_grad()
def perplexity(directory: Path, ids: torch.Tensor) -> float:
    """Of sequences ``ids`` [n, tokens]."""
    own = {} if "quantization_config" in read_json_object(directory / "config.json") else NONE
    base = BaseConfig(path=str(directory), compute_dtype="float32", **own)
    skeleton = build_skeleton(base, directory)
    engine = SingleEngine(torch.device("cpu"))
    engine.shard_model(skeleton.model, skeleton.blocks)
    with RowReader(skeleton.index) as reader:
        load_model(skeleton.model, reader, engine, torch.device("cpu"))
    total, count = 0.0, 0
    for part in ids.split(8):
        logits = skeleton.model(input_ids=part, use_cache=False).logits[:, :-1].double()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
        )
        total, count = total + float(loss), count + part[:, 1:].numel()
    return math.exp(total / count)


def held_out_tokens(base: Path, lines: list[str]) -> torch.Tensor:

    tokenizer = AutoTokenizer.from_pretrained(base)
    text = "\n".join(json.loads(line)["text"] for line in lines)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return torch.tensor(ids[: len(ids) // TOKENS * TOKENS]).view(-1, TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        base = widened(args.base, scratch / "base")
        lines = documents(args.text)
        parts = {"train": lines[:-HELD_OUT], "eval": lines[-HELD_OUT:][:20]}
        for name, part in parts.items():
            (scratch / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
        ids = held_out_tokens(base, lines[-HELD_OUT:])
        tree = {
            "base": {"path": str(base), "quant": None, "compute_dtype": "float32"},
            "adapter": {"kind": "lora", "r": 8, "alpha": 16},
            "data": {
                **{name: [str(scratch / f"{name}.jsonl")] for name in parts},
                "seq_len": TOKENS,
                "too_long": "truncate",
                "cache_dir": str(scratch / "cache"),
            },
            "train": {
                "steps": args.steps,
                "micro_batch": 4,
                "global_batch": 8,
                "lr": 1e-3,
                "device": "cpu",
            },
            "save": {"dir": str(scratch / "run"), "every": 0},
        }
        OmegaConf.save(OmegaConf.create(tree), scratch / "run.yaml")
        command("train", "--config", scratch / "run.yaml")
        run = ["--run", scratch / "run", "--no-verify"]
        command("merge", *run, "--dtype", "float32", "--out", scratch / "merged")
        rows.append({"form": "merged", "perplexity": perplexity(scratch / "merged", ids)})
        for group in (64, 32):
            for words in ([], ["--calibration", scratch / "train.jsonl"]):
                out = scratch / f"awq-{group}-{len(words)}"
                export = ["export", *run, "--format", "awq", "--group-size", group, *words]
                command(*export, "--out", out)
                form = f"groups of {group}, {'searched' if words else 'plain'}"
                rows.append({"form": form, "perplexity": perplexity(out, ids)})
    print_table(["form", "perplexity"], [[r["form"], f"{r['perplexity']:.4f}"] for r in rows])
    write_result("awq_search", {"tokens": ids.numel(), "rows": rows}, args.out)


if __name__ == "__main__":
    main()
