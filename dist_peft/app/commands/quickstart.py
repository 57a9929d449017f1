"""``dist-peft quickstart``: run the main job on one machine, without network, GPU or download.

A small base is pretrained on the sources of Python's standard library (or ``--base`` names another
one), a task is generated from the same text, then the same commands run as on a cluster: train on
two processes, merge, reload. All printed figures are measured.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from dist_peft.app.run_report import add_report_section
from dist_peft.app.verified_export import merge_finished_run
from dist_peft.core.config.io import dump_config, parse_config
from dist_peft.core.config.run import BaseConfig, RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import setup_log
from dist_peft.core.world import World
from dist_peft.export.verify import generate_greedy
from dist_peft.model.hub import resolve_base_directory
from dist_peft.quickstart.task import write_stdlib_task
from dist_peft.quickstart.tiny_model import pretrain_tiny_base
from dist_peft.store.writer import write_atomically
from dist_peft.train.report import ReportSection
from dist_peft.train.step_metrics import METRICS_FILE, read_metrics

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", help="local Hugging Face directory or hub id; default: pretrain a small base"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="directory")
    parser.add_argument("--ranks", type=_parse_positive_int, default=2, help="processes")
    parser.add_argument("--steps", type=_parse_positive_int, default=120, help="optimizer steps")
    parser.add_argument(
        "--pretrain-seconds", type=float, default=75.0, help="time for the small base"
    )


def _parse_positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def run(args: argparse.Namespace, world: World) -> int:
    if world.size > 1:
        raise UserError("quickstart starts its own processes; run it with plain python")
    start = time.perf_counter()
    out: Path = args.out
    setup_log(None, 0, 1)
    if args.base:
        resolve_base_directory(BaseConfig(path=args.base))  # fail fast
    _print_stage("1/5 base model")
    base = args.base or str(_make_base_directory(out / "base", args.pretrain_seconds))
    _print_stage("2/5 task: fill in a card about a function, held-out files for evaluation")
    train, held_out = write_stdlib_task(out / "data")
    config = _build_run_config(base, train, held_out, out / "run", args)
    config_file = out / "quickstart.yaml"
    write_atomically(config_file, dump_config(config))
    _print_stage(f"3/5 QLoRA on {args.ranks} processes: NF4 base, sharded")
    _launch_training(config_file, args.ranks, out / "run")
    _print_stage("4/5 merge into a plain Hugging Face directory, reload in transformers")
    if (out / "merged").exists():
        shutil.rmtree(out / "merged")
    merge_finished_run(out / "run", out / "merged")
    _print_stage("5/5 before and after")
    _show_generations(config, held_out, out)
    _print_stage(f"done in {time.perf_counter() - start:.0f} s; open {out / 'run' / 'report.html'}")
    return 0


def _print_stage(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _make_base_directory(directory: Path, seconds: float) -> Path:
    report = pretrain_tiny_base(directory, seconds=seconds)
    print(report)
    return directory


def _build_run_config(
    base: str, train: Path, held_out: Path, run_dir: Path, args: argparse.Namespace
) -> RunConfig:
    cuda = torch.cuda.is_available()
    return parse_config(
        {
            "base": {
                "path": base,
                "quant": {"kind": "nf4"},
                # CPUs without bf16 units compute faster and more exactly in float32
                "compute_dtype": "bfloat16" if cuda else "float32",
            },
            "adapter": {"kind": "lora", "r": 16, "alpha": 32},
            "data": {
                "train": [str(train)],
                "eval": [str(held_out)],
                "seq_len": 256,
                "too_long": "drop",
                "cache_dir": str(run_dir.parent / "tokens"),
            },
            "train": {
                "steps": args.steps,
                "micro_batch": 2,
                "global_batch": 8,
                "lr": 2e-3,
                "warmup": 0.05,
                "log_every": 10,
            },
            "engine": {"activation_checkpointing": False},
            "save": {"dir": str(run_dir), "every": 0},
            "resume": "never",
        }
    )


def _launch_training(config_file: Path, ranks: int, run_dir: Path) -> None:
    """Run ``dist-peft train`` in subprocesses, with the command line that a user would type."""
    if run_dir.exists():
        shutil.rmtree(run_dir)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else [])]
    command += ["-m", "dist_peft", "train", "--config", str(config_file)]
    print("$ " + " ".join(["python", *command[1:]]), flush=True)
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        raise UserError(f"training ended with exit code {done.returncode}; see the messages above")


def _show_generations(config: RunConfig, held_out: Path, out: Path) -> None:
    records = read_metrics(out / "run" / METRICS_FILE)
    before, after = records[0].eval_loss_before, records[-1].eval_loss
    assert before is not None and after is not None
    print(f"held-out loss: {before:.3f} before, {after:.3f} after ({1 - after / before:.0%} less)")
    examples = [json.loads(line) for line in held_out.read_text().splitlines()[:3]]
    prompts = [e["prompt"] for e in examples]
    base = generate_greedy(resolve_base_directory(config.base), prompts)
    tuned = generate_greedy(out / "merged", prompts)
    samples = []
    for example, was, now in zip(examples, base, tuned, strict=True):
        text = f"reference: {example['completion']}\nbase: {was}\nfine-tuned: {now}"
        samples.append((example["prompt"], text))
        print(f"\n{example['prompt']}{text}")
    add_report_section(out / "run", ReportSection("Samples", texts=tuple(samples)))
