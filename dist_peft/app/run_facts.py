"""Facts for reports: the training data, and the versions, hardware and command of a run."""

import importlib.metadata
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import psutil
import torch

from dist_peft.app.data_setup import DataLoaders
from dist_peft.core.processor import describe_cpu
from dist_peft.core.redaction import redact_text
from dist_peft.core.world import World
from dist_peft.data.loader import SequenceDataset
from dist_peft.train.metrics import format_byte_count
from dist_peft.train.run_summary import Row

__all__ = ["find_source_commit", "list_data_rows", "list_environment_rows", "sample_sequences"]

_SAMPLE = 200
"""Sequences that lengths are taken from; at most."""

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")


def list_data_rows(loaders: DataLoaders) -> list[Row]:
    """Return facts about the data that were trained on and held out."""
    rows = loaders.train.rows
    kind = f"packed to {rows.seq_len:,} tokens" if rows.packed else "one document each"
    found = [("Training sequences", f"{len(rows):,}, {kind}")]
    if rows.task_names != ("",):
        counts = zip(rows.task_names, rows.sequence_counts, strict=True)
        found.append(("By task", ", ".join(f"{name} {count:,}" for name, count in counts)))
    found.append(("Longest document", f"{rows.longest:,} tokens"))
    found += _list_length_rows(rows)
    if loaders.eval is not None:
        found.append(("Held-out sequences", f"{len(loaders.eval.rows):,}"))
    return [(label, redact_text(value)) for label, value in found]


def _list_length_rows(rows: SequenceDataset) -> list[Row]:
    lengths, targets = sample_sequences(rows)
    of = f"of {len(lengths):,} sequences"
    median = f"median {statistics.median(lengths):,.0f}"
    return [
        ("Tokens of a sequence", f"{min(lengths):,} to {max(lengths):,}, {median} ({of})"),
        ("Target tokens", f"{sum(targets) / max(1, sum(lengths)):.1%} of the tokens ({of})"),
    ]


def sample_sequences(rows: SequenceDataset, count: int = _SAMPLE) -> tuple[list[int], list[int]]:
    """Return numbers of tokens and of target tokens of ``count`` sequences spread over ``rows``."""
    step = max(1, len(rows) // count)
    chosen = range(0, len(rows), step)[:count]
    return [len(rows.get_sequence(n)[0]) for n in chosen], [rows.num_targets(n) for n in chosen]


def list_environment_rows(world: World, device: torch.device, engine: str) -> list[Row]:
    """Return versions, hardware, the command and its time; secrets are left out of the command.

    Args:
        engine: its kind; a library of its own is among the versions.
    """
    packages = (*_PACKAGES, "deepspeed") if engine == "zero" else _PACKAGES
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    own, commit = importlib.metadata.version("dist_peft"), find_source_commit()
    begun = datetime.fromtimestamp(psutil.Process().create_time()).astimezone()
    return [
        ("dist_peft", f"{own}, commit {commit}" if commit else own),
        ("Versions", ", ".join([f"Python {platform.python_version()}", *versions])),
        ("Hardware", _describe_hardware(device)),
        ("Hosts", _describe_hosts(world.rank_hosts or [world.host])),
        ("Command", redact_text(_format_command(sys.argv))),
        ("Process begun", begun.strftime("%Y-%m-%d %H:%M %Z")),
    ]


def _format_command(arguments: Sequence[str]) -> str:
    program = Path(arguments[0])
    name = f"python -m {program.parent.name}" if program.name == "__main__.py" else program.name
    return f"{name} {shlex.join(arguments[1:])}".rstrip()


def _describe_hosts(hosts: Sequence[str]) -> str:
    """Return each host with its number of ranks; of many, the first ones."""
    counts = Counter(hosts)
    names = [f"{name} ({count})" if count > 1 else name for name, count in counts.items()]
    return ", ".join(names[:8]) + (f", ... {len(names)} hosts" if len(names) > 8 else "")


def _describe_hardware(device: torch.device) -> str:
    """Return the first rank's GPU or processor, with its memory."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return f"{found.name}, {format_byte_count(found.total_memory)}"
    memory = format_byte_count(psutil.virtual_memory().total)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{describe_cpu()}, {cores} cores, {memory}"


def find_source_commit(directory: Path | None = None) -> str:
    """Return the commit of a checkout that dist_peft runs from, marked if its files were changed.

    Args:
        directory: of the checkout; default: where the package is. An installed package has none.
    """
    directory = directory or Path(__file__).resolve().parents[2]
    if not (directory / ".git").exists():
        return ""
    commit = _run_git(directory, "rev-parse", "--short=12", "HEAD")
    changed = commit and _run_git(directory, "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with changes" if changed else commit


def _run_git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
