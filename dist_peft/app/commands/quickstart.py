"""``dist-peft quickstart``: run the main job on one machine, without network, GPU or download.

A small base is pretrained on the sources of Python's standard library (or ``--base`` names another
one), a task is generated from the same text, then the same commands run as on a cluster: train on
two processes, merge, reload. All printed figures are measured.
"""

import argparse
import time
from pathlib import Path
from typing import Literal

from dist_peft.app.quickstart_run import (
    CONFIG_NAME,
    build_quickstart_config,
    check_earlier_results,
    launch_training,
    remove_earlier_results,
    show_generations,
)
from dist_peft.app.verified_export import merge_finished_run
from dist_peft.core.config.io import dump_config
from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import setup_log
from dist_peft.core.world import World
from dist_peft.model.hub import resolve_base_directory
from dist_peft.quickstart.task import write_stdlib_task
from dist_peft.quickstart.tiny_model import PRETRAINING_STEPS, pretrain_tiny_base
from dist_peft.store.writer import write_atomically

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft quickstart``."""
    parser.add_argument(
        "--base", help="local Hugging Face directory or hub id; default: pretrain a small base"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="directory")
    parser.add_argument("--ranks", type=_parse_positive_int, default=2, help="processes")
    parser.add_argument("--steps", type=_parse_positive_int, default=120, help="optimizer steps")
    parser.add_argument(
        "--pretrain-steps",
        type=_parse_positive_int,
        default=PRETRAINING_STEPS,
        help="optimizer steps for the small base",
    )


def _parse_positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def run(args: argparse.Namespace, world: World) -> int:
    """Make a base and a task, train, merge, compare; return 0.

    Raises:
        UserError: several processes, an unusable ``--base``, or a failure of the training.
    """
    if world.size > 1:
        raise UserError("quickstart starts its own processes; run it with plain python")
    start = time.perf_counter()
    out: Path = args.out
    setup_log(None, 0, 1)
    check_earlier_results(out)
    if args.base:
        resolve_base_directory(BaseConfig(path=args.base))  # fail fast
    _print_stage("1/5 base model")
    base = args.base or str(_make_base_directory(out / "base", args.pretrain_steps))
    _print_stage("2/5 task: fill in a card about a function, held-out files for evaluation")
    train, held_out = write_stdlib_task(out / "data")
    config = build_quickstart_config(base, train, held_out, out / "run", args.steps)
    config_file = out / CONFIG_NAME
    remove_earlier_results(out)
    write_atomically(config_file, dump_config(config))
    _print_stage(f"3/5 QLoRA on {args.ranks} processes: NF4 base, sharded")
    launch_training(config_file, args.ranks)
    _print_stage("4/5 merge into a plain Hugging Face directory, reload in transformers")
    # on a CPU into the base as training saw it: the merged model is the trained one
    dtype = config.base.compute_dtype
    into: Literal["original", "decoded"] = "decoded" if dtype == "float32" else "original"
    merge_finished_run(out / "run", out / "merged", into=into, dtype=dtype)
    _print_stage("5/5 before and after: cards about functions that neither model has seen")
    show_generations(config, held_out, out)
    _print_stage(f"done in {time.perf_counter() - start:.0f} s")
    print(f"  report   {out / 'run' / 'report.html'}")
    print(f"  try it   dist-peft chat --model {out / 'merged'} --plain")
    print(
        "  next     dist-peft init: a configuration for a model and records of your own", flush=True
    )
    return 0


def _print_stage(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _make_base_directory(directory: Path, steps: int) -> Path:
    start = time.perf_counter()

    def print_progress(step: int, loss: float) -> None:
        if step * 5 // steps > (step - 1) * 5 // steps:
            left = (time.perf_counter() - start) * (steps - step) / step
            print(f"  step {step} of {steps}, loss {loss:.2f}, {left:.0f} s left", flush=True)

    print(pretrain_tiny_base(directory, steps=steps, on_step=print_progress))
    return directory
