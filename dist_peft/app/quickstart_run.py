"""The run of ``dist-peft quickstart``: its configuration, its processes, its results."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from dist_peft.app.report_files import add_report_section
from dist_peft.core.config.io import load_config, parse_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.export.merge_record import RECORD_NAME
from dist_peft.export.verify import generate_greedy
from dist_peft.model.hub import resolve_base_directory
from dist_peft.quickstart.task import has_right_fields
from dist_peft.train.report_page import ReportSection
from dist_peft.train.step_metrics import METRICS_FILE, read_metrics

__all__ = [
    "CONFIG_NAME",
    "build_quickstart_config",
    "check_earlier_results",
    "format_sample",
    "launch_training",
    "remove_earlier_results",
    "show_generations",
]

CONFIG_NAME = "quickstart.yaml"

_GENERATED, _PRINTED = 10, 3
"""Held-out records that are answered, and shown."""

_CARD_LINES = 3


def build_quickstart_config(
    base: str, train: Path, held_out: Path, run_dir: Path, steps: int
) -> RunConfig:
    """Return the configuration of the quickstart's run: QLoRA on an NF4 base.

    Args:
        base: directory or hub id.
        train, held_out: records.
        run_dir: new directory of the run.
        steps: number of optimizer steps.
    """
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
                "steps": steps,
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


def check_earlier_results(out: Path) -> None:
    """Check that a ``run`` and a ``merged`` in ``out`` are an earlier quickstart's, which the next
    one replaces.

    Raises:
        UserError: they may be something else.
    """
    ours = _is_earlier_run(out)
    for part in (out / "run", out / "merged"):
        if part.exists() and not (ours and (part.name == "run" or (part / RECORD_NAME).is_file())):
            raise UserError(
                f"{part} exists and was not made by the quickstart of {out}; "
                "choose another directory with --out, or remove it yourself"
            )


def _is_earlier_run(out: Path) -> bool:
    """Return whether ``out/run`` is a run of the configuration that the quickstart wrote."""
    try:
        written, used = load_config(out / CONFIG_NAME), load_config(out / "run" / "config.yaml")
    except UserError:
        return False
    return Path(written.save.dir).resolve() == Path(used.save.dir).resolve()


def remove_earlier_results(out: Path) -> None:
    """Remove the directories that ``check_earlier_results`` accepted."""
    for part in (out / "merged", out / "run"):  # the run last: it shows whose the other is
        if part.exists():
            shutil.rmtree(part)


def launch_training(config_file: Path, ranks: int) -> None:
    """Run ``dist-peft train`` in subprocesses, with the command line that a user would type.

    Raises:
        UserError: it ended with another exit code than 0.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else [])]
    command += ["-m", "dist_peft", "train", "--config", str(config_file)]
    print("  runs: " + " ".join(["python", *command[1:]]), flush=True)
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        raise UserError(f"training ended with exit code {done.returncode}; see the messages above")


def format_sample(prompt: str, reference: str, base: str, tuned: str) -> list[str]:
    """Return a function and three cards about it as lines of a terminal, a line a card."""
    function = [line for line in prompt.splitlines() if line and not line.startswith("###")]
    cards = {"reference": reference, "base": base, "fine-tuned": tuned}
    return [*function, *(f"  {name:<12}{_write_on_one_line(card)}" for name, card in cards.items())]


def _write_on_one_line(card: str) -> str:
    lines = card.strip().splitlines()
    more = " ..." if len(lines) > _CARD_LINES else ""
    return " | ".join(lines[:_CARD_LINES]) + more


def show_generations(config: RunConfig, held_out: Path, out: Path) -> None:
    """Print losses and generations before and after; add the generations to the run's report.

    Args:
        config: of the finished run ``out/run``, which is merged in ``out/merged``.
        held_out: records with ``prompt`` and ``completion``.
    """
    records = read_metrics(out / "run" / METRICS_FILE)
    before, after = records[0].eval_loss_before, records[-1].eval_loss
    assert before is not None and after is not None
    lines = held_out.read_text().splitlines()[:_GENERATED]
    examples = [json.loads(line) for line in lines]
    prompts = [e["prompt"] for e in examples]
    base = generate_greedy(resolve_base_directory(config.base), prompts)
    tuned = generate_greedy(out / "merged", prompts)
    samples = []
    for example, was, now in zip(examples, base, tuned, strict=True):
        text = f"reference: {example['completion']}\nbase: {was}\nfine-tuned: {now}"
        samples.append((example["prompt"], text))
    shown = zip(examples[:_PRINTED], base, tuned, strict=False)
    for example, was, now in shown:
        print("\n" + "\n".join(format_sample(example["prompt"], example["completion"], was, now)))
    right = [
        sum(has_right_fields(a, e["completion"]) for a, e in zip(answers, examples, strict=True))
        for answers in (base, tuned)
    ]
    of = f"of {len(examples)} functions that neither model has seen"
    print(f"\ncards with the right kind and arguments: {right[0]} before, {right[1]} after, {of}")
    print(f"held-out loss: {before:.3f} before, {after:.3f} after ({1 - after / before:.0%} less)")
    add_report_section(out / "run", ReportSection("Samples", texts=tuple(samples)))
