"""What is left in one b-bit model: training through the quantizer against merging afterwards.

Every row has the same text, steps, rank and targets, and is measured as it would be deployed:

    base             nothing trained, quantized to b bits
    qlora b          LoRA on the b-bit base, adapter kept apart: the quality to keep
    qlora+rtn b      the same, merged, rounded to the same b bits again
    qa-lora b        QA-LoRA on the b-bit base, merged exactly into float zeros
    through b        adapter.through_quantizer: the b-bit model is what was trained

Measured: held-out loss in nats a token, for each learning rate; which rate is best differs by row.
The b-bit model of ``through`` is exported and loaded by its own library, and must give the very
logits of training (``--max-error 0``).

python benchmarks/through_table.py --base DIR --text FILE [--bits 4 3 2] [--lrs 5e-4 2e-3 5e-3]
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import print_table, write_result
from omegaconf import OmegaConf

from dist_peft.app import cli
from dist_peft.train.step_metrics import read_metrics

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
"""Linears whose inputs groups divide, as QA-LoRA needs it."""


@dataclass(frozen=True)
class Score:
    """``loss`` in nats a token; ``cpu_s`` of the training, with loading and one evaluation."""

    method: str
    bits: int
    lr: float
    seed: int
    loss: float
    cpu_s: float = 0.0


def write_text(file: Path, directory: Path, characters: int, held_out: int) -> tuple[Path, Path]:
    """The first ``characters`` in records of 2000, and the last ``held_out`` records apart."""
    text = file.read_text()[:characters]
    records = [text[i : i + 2000] for i in range(0, len(text), 2000)]
    paths = directory / "train.jsonl", directory / "eval.jsonl"
    for path, part in zip(paths, (records[:-held_out], records[-held_out:]), strict=True):
        path.write_text("".join(json.dumps({"text": record}) + "\n" for record in part))
    return paths


@dataclass
class Bench:
    """Runs the command line in this process, with files under ``directory``."""

    args: argparse.Namespace
    directory: Path
    train: Path
    held_out: Path

    def write_config(
        self, name: str, base: Path, bits: int, lr: float, seed: int, **more: Any
    ) -> Path:
        args = self.args
        quant = {"kind": "int", "bits": bits, "group_size": args.group_size}
        tree = {
            "base": {"path": str(base), "compute_dtype": "float32", "quant": quant},
            "adapter": {"kind": "none"},
            "data": {
                "train": [str(self.train)],
                "eval": [str(self.held_out)],
                "seq_len": args.seq_len,
                "cache_dir": str(self.directory / "cache"),
            },
            "train": {
                "steps": args.steps,
                "micro_batch": args.batch,
                "global_batch": args.batch,
                "lr": lr,
                "schedule": "linear",
                "eval_every": args.steps,
                "seed": seed,
                "device": "cpu",
            },
            "save": {"dir": str(self.directory / name), "every": 0},
            **more,
        }
        file = self.directory / f"{name}.yaml"
        OmegaConf.save(OmegaConf.create(tree), file)
        return file

    def train_run(self, method: str, bits: int, lr: float, seed: int) -> Score:
        args, name = self.args, f"{method}-{bits}-{lr:g}-{seed}"
        adapter: dict[str, Any] = {
            "kind": "qalora" if method == "qa-lora" else "lora",
            "r": args.rank,
            "alpha": 2 * args.rank,
            "target_modules": TARGETS,
        }
        if method == "through":
            adapter["through_quantizer"] = True
        config = self.write_config(name, args.base, bits, lr, seed, adapter=adapter)
        began = time.process_time()
        command("train", "--config", config)
        spent = time.process_time() - began
        loss = read_metrics(self.directory / name / "metrics.jsonl")[-1].eval_loss
        assert loss is not None
        return show_score(Score(method, bits, lr, seed, loss, spent))

    def evaluate_base(self, name: str, base: Path, bits: int) -> float:
        """Held-out loss of ``base`` rounded to ``bits``."""
        config = self.write_config(name, base, bits, 1e-3, 0)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            command("eval", "--config", config)
        return float(json.loads(out.getvalue().splitlines()[-1])["eval_loss"])

    def merge_and_round(self, bits: int, lr: float, seed: int) -> Score:
        run = self.directory / f"qlora-{bits}-{lr:g}-{seed}"
        merged = self.directory / f"{run.name}-merged"
        command("merge", "--run", run, "--out", merged, "--dtype", "float32", "--no-verify")
        loss = self.evaluate_base(f"{run.name}-rtn", merged, bits)
        return show_score(Score("qlora+rtn", bits, lr, seed, loss))

    def check_export(self, bits: int, lr: float, seed: int) -> None:
        """Load the trained codes with their library; any other logit ends the benchmark."""
        run = self.directory / f"through-{bits}-{lr:g}-{seed}"
        out = self.directory / f"{run.name}-export"
        command("export", "--run", run, "--format", "hf-metal", "--out", out, "--max-error", "0")


def command(verb: str, *argv: object) -> None:
    code = cli.main([verb, *map(str, argv)])
    if code:
        raise SystemExit(f"dist-peft {verb} ended with {code}")


def show_score(score: Score) -> Score:
    print(f"RESULT {score}", flush=True)
    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="a pretrained causal LM")
    parser.add_argument("--text", type=Path, required=True, help="plain text, learned and held out")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--lrs", type=float, nargs="+", default=[5e-4, 2e-3, 5e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=96)
    parser.add_argument("--characters", type=int, default=560_000)
    parser.add_argument("--held-out", type=int, default=15, help="records of 2000 characters")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        bench = Bench(
            args, directory, *write_text(args.text, directory, args.characters, args.held_out)
        )
        scores: list[Score] = []
        settings = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
        for bits in args.bits:
            loss = bench.evaluate_base(f"base-{bits}", args.base, bits)
            scores.append(show_score(Score("base", bits, 0.0, 0, loss)))
            for seed in args.seeds:
                for lr in args.lrs:
                    scores.append(bench.train_run("qlora", bits, lr, seed))
                    scores.append(bench.train_run("through", bits, lr, seed))
                    scores.append(bench.merge_and_round(bits, lr, seed))
                    scores.append(bench.train_run("qa-lora", bits, lr, seed))
                bench.check_export(bits, args.lrs[-1], seed)
            write_result("through_table", {"settings": settings, "scores": scores})
        show_table(scores, args.lrs)


def show_table(scores: list[Score], lrs: list[float]) -> None:
    """Mean loss over the seeds by rate."""
    rows = []
    for method, bits in dict.fromkeys((s.method, s.bits) for s in scores):
        own = [s for s in scores if (s.method, s.bits) == (method, bits)]
        means = []
        for lr in lrs:
            losses = [s.loss for s in own if s.lr in (lr, 0.0)]
            means.append(statistics.fmean(losses))
        rows.append([method, bits, *(f"{mean:.4f}" for mean in means), f"{min(means):.4f}"])
    print_table(["held-out loss", "bits", *(f"lr {lr:g}" for lr in lrs), "best"], rows)


if __name__ == "__main__":
    main()
