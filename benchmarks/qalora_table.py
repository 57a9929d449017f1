"""The QA-LoRA paper's table in shape (Xu et al. 2024, tables 1 and 2): what is left at b bits?

Every row is fine-tuned on the same instructions with the same budget, then measured as it would be
deployed:

    base             nothing trained, nothing quantized
    qlora            NF4 base + LoRA, 16-bit adapter kept apart: the quality to keep
    qlora+gptq b     qlora merged to 16 bits, then quantized by GPTQ to b bits
    qa-lora b        base quantized by GPTQ to b bits, QA-LoRA trained on it, merged exactly
    through b        adapter.through_quantizer with solver gptq: the b-bit model is the trained one
    through+zeros b  the same with adapter.through_zeros (3 and 2 bits)

Measured: held-out loss of the instructions (nats a token), and the share of commonsense questions
answered right by likelihood per character (``dist-peft eval --choices``).

python benchmarks/qalora_table.py --base DIR --instructions FILE --commonsense DIR [--seeds 0 1 2]
    [--only-through]  adds the rows of ``through`` to those of the result file, by method and seed
"""

import argparse
import contextlib
import io
import itertools
import json
import random
import re
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, print_table, write_result
from omegaconf import OmegaConf

from dist_peft.app import cli

ZEROS = "through+zeros"

SETS = ("ARC-Challenge", "ARC-Easy", "boolq", "openbookqa", "piqa")


@dataclass(frozen=True)
class Score:
    """``loss`` in nats a token; ``accuracy``: right answers by set, as shares."""

    method: str
    bits: int
    seed: int
    loss: float
    accuracy: dict[str, float]

    @property
    def mean_accuracy(self) -> float:
        return statistics.fmean(self.accuracy.values())


# -- data ----------------------------------------------------------------------------------------


def split_instructions(file: Path, directory: Path, held_out: int) -> tuple[Path, Path]:
    """Alpaca records -> training file, and one of the last ``held_out``."""
    records = json.loads(file.read_text())
    paths = directory / "train.jsonl", directory / "eval.jsonl"
    for path, part in zip(paths, (records[:-held_out], records[-held_out:]), strict=True):
        path.write_text("".join(json.dumps(record) + "\n" for record in part))
    return paths


def question(record: dict[str, str]) -> dict[str, Any] | None:
    """An ``LLM-Adapters`` record as a question with its answers in full; None: not of that form."""
    name, _, names = record["instruction"].rpartition("Answer format: ")
    names = [n.strip() for n in names.split("/")]
    text = name.partition("question: ")[2]
    if names == ["true", "false"]:
        choices, text = [" true", " false"], text.strip()
    else:
        parts = re.split(r"(?:Answer|Solution)\d+: ", text)
        text, choices = parts[0].strip(), [f" {part.strip()}" for part in parts[1:]]
    if record["answer"] not in names or len(choices) != len(names) or min(map(len, choices)) < 2:
        return None
    prompt = f"Question: {text}\nAnswer:"
    return {"prompt": prompt, "choices": choices, "answer": names.index(record["answer"])}


def write_questions(commonsense: Path, directory: Path, count: int, longest: int) -> list[Path]:
    """``count`` questions of each set, chosen at random, of at most ``longest`` characters."""
    paths = []
    for name in SETS:
        records = json.loads((commonsense / name / "test.json").read_text())
        found = [q for q in map(question, records) if q is not None]
        short = [q for q in found if len(q["prompt"]) + max(map(len, q["choices"])) <= longest]
        chosen = random.Random(0).sample(short, min(count, len(short)))
        paths.append(directory / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(q) + "\n" for q in chosen))
    return paths


# -- runs ----------------------------------------------------------------------------------------


@dataclass
class Bench:
    """Runs the command line in this process, with files under ``directory``."""

    args: argparse.Namespace
    directory: Path
    train: Path
    held_out: Path
    questions: list[Path]

    def config(self, name: str, path: Path, seed: int, **sections: Any) -> Path:
        tree = {
            "base": {"path": str(path), "compute_dtype": "float32", **sections.pop("base", {})},
            "adapter": {"kind": "none"},
            "data": {
                "train": [str(self.train)],
                "eval": [str(self.held_out)],
                "seq_len": self.args.seq_len,
                "too_long": "truncate",
                "cache_dir": str(self.directory / "cache"),
            },
            "train": {
                "steps": self.args.steps,
                "micro_batch": 8,
                "global_batch": self.args.batch,
                "lr": self.args.lr,
                "warmup": 0.03,
                "seed": seed,
                "device": "cpu",
            },
            "save": {"dir": str(self.directory / name)},
            **sections,
        }
        file = self.directory / f"{name}.yaml"
        OmegaConf.save(OmegaConf.create(tree), file)
        return file

    def score(self, method: str, bits: int, seed: int, config: Path, *more: str) -> Score:
        files = [word for file in self.questions for word in ("--choices", str(file))]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            command("eval", "--config", config, *more, *files)
        found = json.loads(out.getvalue().splitlines()[-1])
        accuracy = {Path(f).stem: c["accuracy_norm"] for f, c in found["choices"].items()}
        score = Score(method, bits, seed, found["eval_loss"], accuracy)
        print(
            f"{method} {bits} seed {seed}: {score.loss:.4f} {score.mean_accuracy:.4f}", flush=True
        )
        return score


def command(verb: str, *argv: object) -> None:
    code = cli.main([verb, *map(str, argv)])
    if code:
        raise SystemExit(f"dist-peft {verb} ended with {code}")


def integers(bits: int, args: argparse.Namespace) -> dict[str, Any]:
    quant = {"kind": "int", "bits": bits, "group_size": args.group_size, "solver": "gptq"}
    return {"quant": quant}


def lowrank(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    alpha = 2 * args.rank
    return {"kind": kind, "r": args.rank, "alpha": alpha, "target_modules": args.targets}


def run_seed(bench: Bench, seed: int, packed: dict[int, Path]) -> list[Score]:
    """All rows of one seed; ``packed``: the base quantized to each width."""
    args, scores = bench.args, []
    name = f"qlora-{seed}"
    config = bench.config(
        name, args.base, seed, base={"quant": {"kind": "nf4"}}, adapter=lowrank("lora", args)
    )
    command("train", "--config", config)
    scores.append(bench.score("qlora", 4, seed, config, "--run", bench.directory / name))
    merged = bench.directory / f"{name}-merged"
    command("merge", "--run", bench.directory / name, "--out", merged, "--no-verify")
    for bits, base in packed.items():
        name = f"qlora-gptq-{bits}-{seed}"
        again = bench.config(f"{name}-pack", merged, seed, base=integers(bits, args))
        command("quantize", "--config", again, "--out", bench.directory / name)
        config = bench.config(f"{name}-eval", bench.directory / name, seed)
        scores.append(bench.score("qlora+gptq", bits, seed, config))
        name = f"qalora-{bits}-{seed}"
        adapter = lowrank("qalora", args)
        config = bench.config(name, base, seed, base=integers(bits, args), adapter=adapter)
        command("train", "--config", config)
        scores.append(bench.score("qa-lora", bits, seed, config, "--run", bench.directory / name))
    return scores


def run_through(bench: Bench, seed: int, bits: int, method: str) -> Score:
    """One row of ``through`` or ``through+zeros``."""
    args, name = bench.args, f"{method}-{bits}-{seed}"
    adapter = {**lowrank("lora", args), "through_quantizer": True}
    adapter |= {"through_zeros": True} if method == ZEROS else {}
    config = bench.config(name, args.base, seed, base=integers(bits, args), adapter=adapter)
    command("train", "--config", config)
    return bench.score(method, bits, seed, config, "--run", bench.directory / name)


def add_through(
    bench: Bench, settings: dict[str, Any], varied: tuple[list[int], list[int]]
) -> None:
    """Add rows of ``through`` to those of the result file, each as soon as it is there.

    Args:
        varied: seeds and bits.
    """
    known = json.loads((RESULTS / "qalora_table.json").read_text())["result"]
    if known["settings"] != settings:
        raise SystemExit(f"the result file has other settings: {known['settings']}")
    scores = [Score(**score) for score in known["scores"]]
    done = {(s.method, s.bits, s.seed) for s in scores}
    for seed, bits, method in itertools.product(*varied, ("through", ZEROS)):
        if (method == ZEROS and bits > 3) or (method, bits, seed) in done:
            continue
        scores.append(run_through(bench, seed, bits, method))
        write_result("qalora_table", {"settings": settings, "scores": scores})
    show(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="a pretrained causal LM")
    parser.add_argument("--instructions", type=Path, required=True, help="Alpaca records, JSON")
    parser.add_argument("--commonsense", type=Path, required=True, help="SET/test.json each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument(
        "--group-size",
        type=int,
        default=8,
        help="of the integer bases; QA-LoRA's A has in_features / group-size columns",
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--targets",
        nargs="+",
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"],
        help="adapted linears; groups divide their inputs",
    )
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--questions", type=int, default=200, help="of each set")
    parser.add_argument("--only-through", action="store_true", help="keep the other rows")
    args = parser.parse_args()
    settings = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    only_through = settings.pop("only_through")
    if only_through:  # some of those of the file
        settings |= {"seeds": [0, 1, 2], "bits": [4, 3, 2]}
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        train, held_out = split_instructions(args.instructions, directory, 100)
        questions = write_questions(args.commonsense, directory, args.questions, args.seq_len // 2)
        bench = Bench(args, directory, train, held_out, questions)
        if only_through:
            add_through(bench, settings, (args.seeds, args.bits))
            return
        plain = bench.config("base", args.base, 0, base={"quant": None})
        scores = [bench.score("base", 16, 0, plain)]
        packed = {}
        for bits in args.bits:
            config = bench.config(f"base-{bits}-pack", args.base, 0, base=integers(bits, args))
            packed[bits] = directory / f"base-{bits}"
            command("quantize", "--config", config, "--out", packed[bits])
            config = bench.config(f"base-{bits}-eval", packed[bits], 0)
            scores.append(bench.score("base+gptq", bits, 0, config))
        for seed in args.seeds:
            scores += run_seed(bench, seed, packed)
            scores += [run_through(bench, seed, bits, "through") for bits in args.bits]
            few = [bits for bits in args.bits if bits < 4]
            scores += [run_through(bench, seed, bits, ZEROS) for bits in few]
            show(scores)
            write_result("qalora_table", {"settings": settings, "scores": scores})


def show(scores: list[Score]) -> None:
    """Mean and sample standard deviation over the seeds."""
    rows = []
    for method, bits in dict.fromkeys((s.method, s.bits) for s in scores):
        own = [s for s in scores if (s.method, s.bits) == (method, bits)]
        losses, accuracies = [s.loss for s in own], [100 * s.mean_accuracy for s in own]
        sets = [f"{100 * statistics.fmean(s.accuracy[n] for s in own):.1f}" for n in SETS]
        rows.append([method, bits, _spread(losses, 4), _spread(accuracies, 1), *sets])
    print_table(["method", "bits", "held-out loss", "accuracy %", *SETS], rows)


def _spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
