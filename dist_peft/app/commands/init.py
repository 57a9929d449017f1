"""``dist-peft init``: write a commented configuration, and a job script for this cluster."""

import argparse
import re
import sys
from pathlib import Path

import torch

from dist_peft.app.config_arguments import parse_path
from dist_peft.app.init_questions import ask_missing_options
from dist_peft.app.initial_config import InitRequest, propose_config, state_steps, validate_text
from dist_peft.app.job_files import (
    JobRequest,
    find_partition,
    format_start_line,
    render_kubernetes_job,
    render_slurm_job,
)
from dist_peft.app.local_gpu import make_cluster
from dist_peft.app.output_places import refuse_unwritable_file
from dist_peft.app.validation_text import format_init_summary
from dist_peft.core.errors import UserError
from dist_peft.core.log import setup_log
from dist_peft.core.world import World
from dist_peft.store.writer import write_atomically

__all__ = ["DOES_NOT_FIT", "add_arguments", "run"]

DOES_NOT_FIT = 3
"""Exit code where the run needs more memory than the cards have; the files are written."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft init``."""
    add = parser.add_argument
    add("--base", help="directory of the model, or hub id")
    add("--data", help="training records: file, directory, pattern or hub data set")
    add("--eval", help="held-out records; default: 5 %% of --data (data.val_split)")
    add("--out", type=parse_path, default=Path("run.yaml"), help="default: run.yaml")
    add("--column", action="append", default=[], metavar="ROLE=NAME", help="such as prompt=query")
    add("--classify", action="store_true", help="train a classifier of the label column")
    add("--labels", nargs="+", default=[], help="its labels; default: the values in --data")
    add("--seq-len", type=int, help="tokens of a sequence; default: from the data and the base")
    add("--nodes", type=int, default=1, help="hosts (default: 1)")
    add("--gpus", type=int, help="cards of each; default: those of the partition or this host")
    add("--gpu-memory", help="of a card, such as 24GiB; default: of this host's")
    scripts = parser.add_mutually_exclusive_group()
    scripts.add_argument("--slurm", action="store_true", help="also write an sbatch script")
    scripts.add_argument("--k8s", action="store_true", help="also write a PyTorchJob")
    add("--partition", help="SLURM partition; default: that of sinfo with GPUs")
    add("--account", help="SLURM account")
    add("--time", help="SLURM time limit; default: 4 hours, or the partition's")
    add("--image", default="REGISTRY/dist_peft:TAG", help="Kubernetes: image with this package")
    add("--overwrite", action="store_true", help="replace existing files")


def run(args: argparse.Namespace, world: World) -> int:
    """Write the files and print the next commands; return 3 where the run does not fit.

    Raises:
        UserError: an option, the base or the data are wrong; nothing is written.
    """
    if sys.stdin.isatty() and sys.stdout.isatty():
        ask_missing_options(args)
    for name in ("base", "data"):
        if not getattr(args, name):
            raise UserError(
                f"--{name} is missing: give it, or start init on a terminal to be asked"
            )
    partition = find_partition(args.partition) if args.slurm else None
    if args.slurm and args.partition and partition is None:
        raise UserError(f"--partition {args.partition}: sinfo does not show it on this host")
    detected = partition.gpus if partition else torch.cuda.device_count()
    gpus = args.gpus if args.gpus is not None else max(1, detected)
    for option, number in (("nodes", args.nodes), ("gpus", gpus), ("seq-len", args.seq_len or 8)):
        if number < (8 if option == "seq-len" else 1):
            raise UserError(f"--{option} {number} is too small")
    setup_log(None, world.rank, world.size)
    if not world.is_first:
        return 0
    job_file = _choose_job_file(args)
    for file in filter(None, (args.out, job_file)):
        _refuse_taken_file(file, args.overwrite)
    kind = "slurm" if args.slurm else "k8s" if args.k8s else ""
    start = format_start_line(kind, args.out, job_file, args.nodes, gpus)
    cluster, has_limit = make_cluster(args.nodes, gpus, args.gpu_memory)
    text = propose_config(_make_request(args, cluster.ranks, start))
    config, report = validate_text(text, cluster, has_limit=has_limit)
    if report.run is not None:
        text = state_steps(text, report.run.steps)
    write_atomically(args.out, text)
    if job_file is not None:
        title = f"dist_peft: {args.out.name}"
        job = JobRequest(args.out.stem, title, args.out, job_file, Path.cwd(), args.nodes, gpus)
        if args.slurm:
            script = render_slurm_job(job, partition, args.account, args.time)
        else:
            script = render_kubernetes_job(job, args.image)
        write_atomically(job_file, script)
    written = ", ".join(str(file) for file in (args.out, job_file) if file is not None)
    print("\n".join(format_init_summary(report, config, written, str(args.out), start)))
    is_too_large = report.memory is not None and report.memory.fits is False
    return DOES_NOT_FIT if is_too_large else 0


def _make_request(args: argparse.Namespace, ranks: int, start: str) -> InitRequest:
    return InitRequest(
        base=args.base,
        data=args.data,
        file=args.out,
        save_dir=f"runs/{args.out.stem}",
        held_out=args.eval,
        columns=_parse_columns(args.column),
        labels=tuple(args.labels),
        classify=args.classify,
        seq_len=args.seq_len,
        ranks=ranks,
        start=start,
    )


def _choose_job_file(args: argparse.Namespace) -> Path | None:
    if args.slurm:
        return Path(args.out).with_suffix(".sbatch")
    return Path(args.out).with_suffix(".k8s.yaml") if args.k8s else None


def _refuse_taken_file(file: Path, overwrite: bool) -> None:
    refuse_unwritable_file(file, "--out", ".yaml", ".yml", ".sbatch")
    if file.exists() and not overwrite:
        raise UserError(f"{file} exists; give another --out, or replace it with --overwrite")


def _parse_columns(items: list[str]) -> dict[str, str]:
    columns = {}
    for item in items:
        if (match := re.fullmatch(r"(\w+)=(.+)", item)) is None:
            raise UserError(f"--column {item} is not of the form ROLE=NAME, such as prompt=query")
        columns[match[1]] = match[2]
    return columns
