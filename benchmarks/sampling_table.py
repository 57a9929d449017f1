"""Scheduled sampling against teacher forcing: held-out loss, and what the models write themselves.

    python benchmarks/sampling_table.py --base DIR --stories FILE [--seeds 0 1 2]

BASE is a small pretrained model (stories260K as a Hugging Face directory). It is trained with LoRA
to continue TinyStories (JSONL with a column text): a prompt of about 120 characters, and about 200
that follow. The last 96 stories are held out. Ways differ in ``train.scheduled_sampling`` alone.

The teacher-forced loss is the run's own evaluation at the end. For the free-running figures the
adapter is loaded with PEFT, and ``transformers`` continues each held-out prompt greedily: ROUGE-L
(F1 of words) with the gold continuation, the share of gold words at their place, and the share of
word 4-grams that the continuation has had before.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import print_table, write_result
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_peft.app.commands.train import train_from_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World
from dist_peft.train.step_metrics import read_metrics

HELD_OUT, STEPS, BATCH = 96, 80, 16
Record = dict[str, str]


WAYS: dict[str, dict[str, Any] | None] = {
    "teacher forcing": None,
    "argmax": {"schedule": "linear", "c": 0.5 / STEPS},
    "drawn": {"schedule": "linear", "c": 0.5 / STEPS, "temperature": 1.0},
}
"""Gold inputs fall to a half at the last step."""


@dataclass(frozen=True)
class Outcome:
    """One run. ``seconds``: processor time of the training; the others but ``loss``: percent."""

    way: str
    seed: int
    loss: float
    rouge_l: float
    in_place: float
    repeated: float
    replaced: float
    seconds: float


def split_story(text: str) -> Record:
    """Cut between words."""
    first = text.rfind(" ", 0, 120)
    second = text.rfind(" ", 0, 320)
    return {"prompt": text[:first], "completion": text[first:second]}


def write_records(stories: Path, directory: Path) -> list[Record]:
    """Write training and held-out records; return the held-out ones."""
    lines = stories.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"].strip() for line in lines]
    records = [split_story(text) for text in texts if len(text) > 320]
    parts = {"train": records[:-HELD_OUT], "eval": records[-HELD_OUT:]}
    for name, own in parts.items():
        text = "".join(json.dumps(record) + "\n" for record in own)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return parts["eval"]


def train_run(args: argparse.Namespace, data: Path, run: Path, seed: int, way: Any) -> float:
    """Train; return the processor time in seconds."""
    tree = {
        "base": {"path": str(args.base), "quant": None, "compute_dtype": "float32"},
        "adapter": {"kind": "lora", "r": 16, "alpha": 32},
        "engine": {"activation_checkpointing": False},
        "data": {
            "train": [str(data / "train.jsonl")],
            "eval": [str(data / "eval.jsonl")],
            "seq_len": 256,
            "packing": False,
            "cache_dir": str(data / "cache"),
        },
        "train": {
            "micro_batch": BATCH,
            "global_batch": BATCH,
            "lr": 5e-3,
            "steps": STEPS,
            "seed": seed,
            "scheduled_sampling": way,
            "device": "cpu",
            "log_every": 20,
        },
        "save": {"dir": str(run), "every": 0},
    }
    begin = time.process_time()
    assert train_from_config(parse_config(tree), World()) == 0
    return time.process_time() - begin


@torch.no_grad()
def complete(args: argparse.Namespace, run: Path, held_out: Sequence[Record]) -> list[str]:
    """Return the greedy completion of each prompt; at most as many tokens as the longest gold one
    and its end."""
    tokenizer = AutoTokenizer.from_pretrained(args.base, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, run / "adapter").eval()
    gold = [tokenizer(r["completion"], add_special_tokens=False).input_ids for r in held_out]
    batch = tokenizer([r["prompt"] for r in held_out], return_tensors="pt", padding=True)
    found = model.generate(
        **batch,
        max_new_tokens=max(map(len, gold)) + 1,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    new = found[:, batch.input_ids.shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def compute_rouge_l(found: str, gold: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004)."""
    one, two = found.split(), gold.split()
    lengths = [0] * (len(two) + 1)
    for word in one:
        before = 0
        for place, other in enumerate(two, 1):
            longest = before + 1 if word == other else max(lengths[place], lengths[place - 1])
            before, lengths[place] = lengths[place], longest
    return 2 * lengths[-1] / max(1, len(one) + len(two))


def compute_share_in_place(found: str, gold: str) -> float:
    """Share of the gold words that stand at their place."""
    words = gold.split()
    return sum(a == b for a, b in zip(found.split(), words, strict=False)) / len(words)


def compute_repeated_share(text: str) -> float:
    """Share of the word 4-grams that the text has had before."""
    words = text.split()
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return 1 - len(set(grams)) / max(1, len(grams))


def measure(
    args: argparse.Namespace, data: Path, held_out: Sequence[Record], seed: int, way: str
) -> Outcome:
    run = data / f"{way.replace(' ', '-')}-{seed}"
    seconds = train_run(args, data, run, seed, WAYS[way])
    gold = [record["completion"].strip() for record in held_out]
    pairs = list(zip(complete(args, run, held_out), gold, strict=True))
    records = read_metrics(run / "metrics.jsonl")
    loss = records[-1].eval_loss
    assert loss is not None
    return Outcome(
        way,
        seed,
        loss,
        100 * statistics.fmean(compute_rouge_l(*pair) for pair in pairs),
        100 * statistics.fmean(compute_share_in_place(*pair) for pair in pairs),
        100 * statistics.fmean(compute_repeated_share(text) for text, _ in pairs),
        100 * statistics.fmean(r.sampling_replaced or 0.0 for r in records),
        seconds,
    )


def format_spread(values: Sequence[float], digits: int) -> str:
    """Mean, and the lowest and highest value."""
    low, high = min(values), max(values)
    return f"{statistics.fmean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--stories", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch:
        held_out = write_records(args.stories, Path(scratch))
        for seed in args.seeds:
            for way in WAYS:
                outcomes.append(measure(args, Path(scratch), held_out, seed, way))
                print(outcomes[-1], flush=True)
    rows = []
    for way in WAYS:
        own = [o for o in outcomes if o.way == way]
        spreads = [format_spread([o.loss for o in own], 4)]
        for name in ("rouge_l", "in_place", "repeated"):
            spreads.append(format_spread([getattr(o, name) for o in own], 1))
        shares = [
            statistics.fmean(getattr(o, name) for o in own) for name in ("replaced", "seconds")
        ]
        rows.append([way, *spreads, *shares])
    header = ["way", "held-out loss", "ROUGE-L", "in place", "repeated", "replaced", "CPU s"]
    print_table(header, rows)
    settings = {"steps": STEPS, "batch": BATCH, "held_out": HELD_OUT, "ways": WAYS}
    write_result("sampling_table", {"settings": settings, "outcomes": outcomes})


if __name__ == "__main__":
    main()
