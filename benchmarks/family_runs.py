"""Whole runs of one model type for ``families.py``: two ranks, a merge, and every export.

The model of a type is trained for three steps by ``dist-peft train`` (LoRA on all linears, NF4,
float32) on one rank and on two; the run of one rank is merged and exported in each format, with
groups of 32. Each output is loaded by its consumer and compared with the trained model, as in any
other export; merges and formats of rounded weights into the base as it was trained (``decoded``).
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))

from dist_peft.adapters.lora.method import LoraAdapter
from dist_peft.core.config.run import BaseConfig, LoraConfig, RunConfig
from dist_peft.export.formats.export_format import PlannedExport
from dist_peft.export.formats.registry import FORMATS as EXPORTS
from dist_peft.model.skeleton import Skeleton
from tests.support.forked_commands import Ended, run_forked

__all__ = ["FORMATS", "VOCABULARY", "find_format_obstacles", "save_tokenizer", "try_runs"]

VOCABULARY = 263
"""Rows of an embedding: the bytes, three special tokens, and more that no rank count divides."""

_WORDS = """
gguf --type f16 --base decoded
mlx --bits 8 --group-size 32 --base decoded
hf-metal --bits 8 --group-size 32 --base decoded
compressed-tensors --merge --lossy --bits 8 --group-size 32 --base decoded
fp8 --group-size 32 --base decoded
mxfp4 --base decoded
bnb-nf4 --base decoded
gptq --merge --lossy --bits 8 --group-size 32 --base decoded
awq --group-size 32 --base decoded
"""
FORMATS = {line.split()[0]: tuple(line.split()) for line in _WORDS.strip().splitlines()}
"""Name of a column -> arguments of ``dist-peft export --format``."""

_UNREAD = ("gptq", "awq")
"""Formats that are written and not loaded: gptqmodel needs 20 seconds for each."""

_MERGED = {"merge": True, "lossy": True}
"""Options of ``FORMATS`` that formats have obstacles by."""


def find_format_obstacles(skeleton: Skeleton, directory: Path, base: BaseConfig) -> dict[str, str]:
    """Return the reason for each of ``FORMATS`` that refuses the type before it is trained."""
    config = RunConfig.model_validate(
        {"base": base, "adapter": {"kind": "lora"}, "data": {"train": ["unused.jsonl"]}}
    )
    adapter = LoraAdapter(LoraConfig(), seed=0, arithmetic=torch.float32)
    run = PlannedExport(config, skeleton, directory, adapter.get_export_limits(skeleton.tied))
    found = {name: EXPORTS[name].find_obstacle(run, _MERGED) for name in FORMATS}
    return {name: reason for name, reason in found.items() if reason}


def try_runs(base: Path, scratch: Path, formats: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """What the table has of the whole runs of the model in ``base``.

    Returns:
        ``ranks``: largest difference of a loss on two ranks, or a message. ``merge`` and each of
        ``formats``: the error as a share of the change by training, or a message.
    """
    config = _save_run(base, scratch)
    found: dict[str, Any] = {}
    one = run_forked(["train", "--config", str(config), f"save.dir={scratch}/run1"], scratch)
    if message := _find_failure(one):
        return {"ranks": message}
    two = run_forked(
        ["train", "--config", str(config), f"save.dir={scratch}/run2"], scratch, ranks=2
    )
    losses = [_read_losses(scratch / name) for name in ("run1", "run2")]
    found["ranks"] = _find_failure(two) or max(abs(a - b) for a, b in zip(*losses, strict=True))
    merge = ["merge", "--run", "run1", "--out", "merged", "--base", "decoded"]
    found["merge"] = _run_export([*merge, "--dtype", "float32"], scratch)
    for name, arguments in formats.items():
        export = ["export", "--run", "run1", "--out", f"out/{name}", "--format", *arguments]
        found[name] = _run_export([*export, *(["--no-verify"] * (name in _UNREAD))], scratch)
    return found


def save_tokenizer(directory: Path) -> None:
    """A byte-level BPE as GPT-2's, whose first three ids are special."""
    specials = ["<pad>", "<s>", "</s>"]
    texts = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {text: i for i, text in enumerate([*texts, "te"])}
    inner = Tokenizer(models.BPE(vocabulary, [("t", "e")]))  # llama.cpp wants a merge
    inner.add_special_tokens([AddedToken(text, special=True) for text in specials])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(directory)


def _save_run(base: Path, scratch: Path) -> Path:
    scratch.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 8), ("eval", 3)):
        lines = [
            json.dumps({"prompt": f"{i} ", "completion": f"text {7 * i + 3}"}) for i in range(count)
        ]
        (scratch / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    tree = {
        "base": {"path": str(base), "compute_dtype": "float32", "quant": {"kind": "nf4"}},
        "adapter": {"kind": "lora", "r": 4, "alpha": 8},
        "data": {
            "train": [str(scratch / "train.jsonl")],
            "eval": [str(scratch / "eval.jsonl")],
            "seq_len": 24,
            "packing": False,
            "cache_dir": str(scratch / "cache"),
        },
        "train": {
            "micro_batch": 1,
            "global_batch": 2,
            "lr": 1e-2,
            "steps": 3,
            "device": "cpu",
            "samples": 0,
        },
        "save": {"every": 3},
    }
    OmegaConf.save(OmegaConf.create(tree), scratch / "run.yaml")
    return scratch / "run.yaml"


def _read_losses(run: Path) -> list[float]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def _find_failure(ended: list[Ended]) -> str:
    """The message of a command that failed; empty: none did."""
    for one in ended:
        if one.code != 0:
            lines = [line for line in one.stderr.splitlines() if line.strip()]
            code = "over the limit of time" if one.code is None else f"exit {one.code}"
            return f"{code}: {lines[-1][:300] if lines else ''}"
    return ""


def _run_export(words: list[str], scratch: Path) -> float | str:
    (ended,) = run_forked([*words, "--json"], scratch)
    try:
        document = json.loads(ended.stdout)
    except ValueError:
        return _find_failure([ended]) or "no document"
    if "error" in document:
        lines = str(document["error"]).replace(str(scratch), "").splitlines()
        return f"{lines[0]} {lines[-1] if len(lines) > 1 else ''}"[:300].strip()
    if (comparison := document["comparison"]) is not None:
        return float(comparison["relative"])
    skipped = [line for line in ended.stderr.splitlines() if "NOT VERIFIED" in line]
    return skipped[0].partition("NOT VERIFIED")[2].strip(": ")[:200] if skipped else "written"
