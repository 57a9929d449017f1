"""What is left in one b-bit model: training through the quantizer against merging afterwards.

Every row has the same text, steps, rank and targets, and is measured as it would be deployed:

    base             nothing trained, quantized to b bits
    qlora b          LoRA on the b-bit base, adapter kept apart: the quality to keep
    qlora+rtn b      the same, merged, rounded to the same b bits again
    qlora+gptq b     the same, merged, quantized by GPTQ with text that was trained on
    qa-lora b        QA-LoRA on the b-bit base, merged exactly into float zeros
    through b        adapter.through_quantizer: the b-bit model is the trained one
    through+gptq b   the same with base.quant.solver: gptq, whose codes are GPTQ's in each step
    through8 b       through b with adapter.through_start: 8bit (3 and 2 bits)
    through+zeros b  through b with adapter.through_zeros (3 and 2 bits)
    through+zeros+hqq b   the same with base.quant.solver: hqq

Measured: held-out loss in nats a token, for each learning rate; which rate is best differs by row.
The b-bit model of ``through`` is exported and loaded by its own library, and must give the very
logits of training (``--max-error 0``).

Scores are kept in the result file: a run that was stopped continues, and further seeds and rates
are added to those that are there.

With ``--pretrain JSONL --tokenizer DIR`` the base is made first, if there is none in ``--base``: a
Llama of 0.66 million parameters, hidden size 128, trained from random weights by
``adapter.kind: full`` on that text. Its loss is in the result.

python benchmarks/through_table.py --base DIR --text FILE [--bits 4 3 2] [--lrs 5e-3 2e-3 1e-2]
python benchmarks/through_table.py --base OUT --pretrain JSONL --tokenizer DIR --text FILE \
    --group-size 16 --name through_table_pretrained
"""

import argparse
import contextlib
import io
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from common import RESULTS, print_table, write_result
from omegaconf import OmegaConf

from dist_peft.app import cli
from dist_peft.train.step_metrics import read_metrics

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
"""Linears whose inputs groups divide, as QA-LoRA needs it."""


GPTQ = {"solver": "gptq", "calibration_samples": 32, "calibration_tokens": 96}

FEW_BITS = ["through+zeros", "through+zeros+hqq", "through8"]
"""For 3 and 2 bits."""

METHODS = [
    *("qlora", "through", "through+gptq", *FEW_BITS),
    *("qlora+rtn", "qlora+gptq", "qa-lora"),
]

PRETRAINED = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}


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
        quant |= more.pop("solver", {})
        tree = {
            "base": {"path": str(base), "compute_dtype": args.compute_dtype, "quant": quant},
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
                "samples": 0,
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
        if method.startswith("through"):
            adapter["through_quantizer"] = True
        if method == "through8":
            adapter["through_start"] = "8bit"
        adapter |= {"through_zeros": True} if "zeros" in method else {}
        solver = GPTQ if method == "through+gptq" else {}
        solver = {"solver": "hqq"} if method.endswith("hqq") else solver
        config = self.write_config(name, args.base, bits, lr, seed, adapter=adapter, solver=solver)
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

    def merge_and_quantize(self, method: str, bits: int, lr: float, seed: int) -> Score:
        """Loss of a merged qlora run that is quantized again, by rounding or by GPTQ."""
        run = self.directory / f"qlora-{bits}-{lr:g}-{seed}"
        merged = self.directory / f"{run.name}-merged"
        if not merged.is_dir():
            command("merge", "--run", run, "--out", merged, "--dtype", "float32", "--no-verify")
        name = f"{run.name}-{method}"
        if method == "qlora+gptq":
            config = self.write_config(f"{name}-solve", merged, bits, lr, seed, solver=GPTQ)
            solved = self.directory / f"{name}-base"
            command("quantize", "--config", config, "--out", solved)
            loss = self.evaluate_base(name, solved, bits)
        else:
            loss = self.evaluate_base(name, merged, bits)
        return show_score(Score(method, bits, lr, seed, loss))

    def measure(self, method: str, bits: int, lr: float, seed: int) -> Score:
        """Train or merge for one cell of the table."""
        if method == "base":
            return show_score(
                Score(
                    "base", bits, 0.0, 0, self.evaluate_base(f"base-{bits}", self.args.base, bits)
                )
            )
        if method.startswith("qlora+"):
            if not (self.directory / f"qlora-{bits}-{lr:g}-{seed}").is_dir():
                self.train_run("qlora", bits, lr, seed)
            return self.merge_and_quantize(method, bits, lr, seed)
        score = self.train_run(method, bits, lr, seed)
        is_exact = self.args.compute_dtype == "float32"  # a library rounds other steps to 16 bits
        if method.startswith("through") and seed == self.args.seeds[-1] and is_exact:
            self.check_export(method, bits, lr, seed)
        return score

    def check_export(self, method: str, bits: int, lr: float, seed: int) -> None:
        """Load the trained codes with their library; any other logit ends the benchmark."""
        run = self.directory / f"{method}-{bits}-{lr:g}-{seed}"
        out = self.directory / f"{run.name}-export"
        command("export", "--run", run, "--format", "hf-metal", "--out", out, "--max-error", "0")


def pretrain(args: argparse.Namespace) -> dict[str, Any]:
    """Train the base from random weights, if it is not there. Returns what was done."""
    facts = args.base / "pretrained.json"
    if facts.is_file():
        return dict(json.loads(facts.read_text()))
    scratch = args.base.with_name(f"{args.base.name}-training")
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, f"{name}_id") for name in ("bos_token", "eos_token")}
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), **PRETRAINED, **{f"{k}_id": v for k, v in ids.items()}
    )
    transformers.LlamaForCausalLM(config).save_pretrained(scratch / "random")
    tokenizer.save_pretrained(scratch / "random")
    records = args.pretrain.read_text().splitlines(keepends=True)
    parts = {"eval": records[:30], "train": records[30:]}
    for name, lines in parts.items():
        (scratch / f"{name}.jsonl").write_text("".join(lines))
    data: dict[str, Any] = {k: [str(scratch / f"{k}.jsonl")] for k in parts}
    tree = {
        "base": {"path": str(scratch / "random"), "compute_dtype": "float32", "quant": None},
        "adapter": {"kind": "full"},
        "data": {**data, "seq_len": 256, "cache_dir": str(scratch / "cache")},
        "train": {
            "steps": args.pretrain_steps,
            "micro_batch": 8,
            "global_batch": 8,
            "lr": 3e-3,
            "schedule": "cosine",
            "warmup": 0.05,
            "eval_every": args.pretrain_steps,
            "samples": 0,
            "device": "cpu",
        },
        "save": {"dir": str(scratch / "run"), "every": 0},
    }
    OmegaConf.save(OmegaConf.create(tree), scratch / "run.yaml")
    command("train", "--config", scratch / "run.yaml")
    loss = read_metrics(scratch / "run" / "metrics.jsonl")[-1].eval_loss
    command("merge", "--run", scratch / "run", "--out", args.base, "--dtype", "float32")
    done = {"text": args.pretrain.name, "steps": args.pretrain_steps, "tokens_a_step": 2048}
    facts.write_text(json.dumps({**done, "held_out_loss": loss}))
    return pretrain(args)


def command(verb: str, *argv: object) -> None:
    code = cli.main([verb, *map(str, argv)])
    if code:
        raise SystemExit(f"dist-peft {verb} ended with {code}")


def show_score(score: Score) -> Score:
    print(f"RESULT {score}", flush=True)
    return score


def list_cells(args: argparse.Namespace) -> Iterator[tuple[str, int, float, int]]:
    """Method, bits, rate and seed of every cell; a run comes before the merges of it."""
    yield from (("base", bits, 0.0, 0) for bits in args.bits)
    for lr, seed, bits in itertools.product(args.lrs, args.seeds, args.bits):
        for method in args.methods:
            if method not in FEW_BITS or bits < 4:
                yield method, bits, lr, seed


def read_scores(name: str, settings: dict[str, Any]) -> list[Score]:
    """Scores of an earlier run with the same settings."""
    file = RESULTS / f"{name}.json"
    found = json.loads(file.read_text())["result"] if file.is_file() else {}
    if found.get("settings") != settings:
        return []
    return [Score(**score) for score in found["scores"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="a pretrained causal LM")
    parser.add_argument("--text", type=Path, required=True, help="plain text, learned and held out")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--lrs", type=float, nargs="+", default=[5e-3, 2e-3, 1e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=96)
    parser.add_argument("--characters", type=int, default=560_000)
    parser.add_argument("--held-out", type=int, default=15, help="records of 2000 characters")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--name", default="through_table", help="of the result file")
    parser.add_argument("--pretrain", type=Path, help="text to train the base on, JSON Lines")
    parser.add_argument("--pretrain-steps", type=int, default=700)
    parser.add_argument("--tokenizer", type=Path, help="of the base that is trained")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many")
    args = parser.parse_args()
    varied = ["bits", "lrs", "seeds", "minutes", "methods", "name"]
    varied += ["pretrain", "pretrain_steps", "tokenizer"]
    varied += ["compute_dtype"] if args.compute_dtype == "float32" else []
    settings = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    settings = {k: v for k, v in settings.items() if k not in varied}
    if args.pretrain is not None:
        settings["pretrained"] = pretrain(args)
    scores = read_scores(args.name, settings)
    done = {(s.method, s.bits, s.lr, s.seed) for s in scores}
    deadline = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        texts = write_text(args.text, directory, args.characters, args.held_out)
        bench = Bench(args, directory, *texts)
        for cell in list_cells(args):
            if cell in done or time.monotonic() > deadline:
                continue
            scores.append(bench.measure(*cell))
            write_result(args.name, {"settings": settings, "scores": scores})
    show_table(scores)


def show_table(scores: list[Score]) -> None:
    """Mean over the seeds by rate, of those rates that every seed has; lowest and highest seed at
    the best rate."""
    lrs = sorted({s.lr for s in scores} - {0.0})
    seeds = {s.seed for s in scores}
    rows = []
    for bits, method in sorted({(s.bits, s.method) for s in scores}, key=lambda k: (-k[0], k[1])):
        own = [s for s in scores if (s.method, s.bits) == (method, bits)]
        cells: dict[float, list[float]] = {}
        for lr in lrs:
            losses = [s.loss for s in own if s.lr in (lr, 0.0)]
            if losses:
                cells[lr] = losses
        whole = {lr: c for lr, c in cells.items() if len(c) == len(seeds) or method == "base"}
        best = min(whole.values(), key=statistics.fmean, default=[])
        spread = (
            f"{statistics.fmean(best):.3f} ({min(best):.3f} to {max(best):.3f})" if best else ""
        )
        shown = [
            f"{statistics.fmean(cells[lr]):.3f}" + ("" if lr in whole else " (one seed)")
            if lr in cells
            else "-"
            for lr in lrs
        ]
        rows.append([method, bits, *shown, spread])
    print_table(["held-out loss", "bits", *(f"lr {lr:g}" for lr in lrs), "best"], rows)


if __name__ == "__main__":
    main()
