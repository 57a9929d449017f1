"""``dist-peft merge`` and ``dist-peft export``: from a run directory to something others load."""

import argparse
import logging
import shutil
from pathlib import Path

import torch

from dist_peft.adapters.peft_format import factors, read_adapter
from dist_peft.app.report import add_section
from dist_peft.core.config import RunConfig
from dist_peft.core.config_io import load_config
from dist_peft.core.errors import UserError
from dist_peft.core.log import setup_log
from dist_peft.core.world import World
from dist_peft.export.merge import check_new, merge_model
from dist_peft.export.verify import Probe, verify_directory
from dist_peft.model.hub import resolve_base
from dist_peft.model.skeleton import torch_dtype
from dist_peft.train.report import Section

__all__ = ["FORMATS", "merge_run", "run_export", "run_merge"]

log = logging.getLogger("dist_peft")

FORMATS = ("hf-bf16", "peft")


def run_merge(args: argparse.Namespace, world: World) -> int:
    _only_one(world)
    setup_log(None, 0, 1)
    merge_run(args.run_dir, args.out, into=args.base, verify=not args.no_verify)
    return 0


def run_export(args: argparse.Namespace, world: World) -> int:
    _only_one(world)
    setup_log(None, 0, 1)
    if args.format == "hf-bf16":
        merge_run(args.run_dir, args.out, into=args.base, verify=not args.no_verify)
        return 0
    _run_config(args.run_dir)
    check_new(args.out)
    adapter = args.run_dir / "adapter"
    factors(read_adapter(adapter))  # a damaged one is refused, not copied
    try:
        shutil.copytree(adapter, args.out, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        raise UserError(f"cannot write {args.out}: {error}; choose another directory") from None
    log.info("wrote PEFT adapter %s", args.out)
    return 0


@torch.no_grad()
def merge_run(run_dir: Path, out: Path, *, into: str = "original", verify: bool = True) -> None:
    """Merge a finished run and, unless told otherwise, reload the result and compare logits."""
    config = _run_config(run_dir)
    probe = Probe.load(run_dir / "probe.safetensors") if verify else None
    directory = resolve_base(config.base)
    report = merge_model(
        config.base,
        directory,
        run_dir / "adapter",
        out,
        into="decoded" if into == "decoded" else "original",
    )
    log.info(
        "wrote %s: %d tensors, %d of them merged, %.1f MiB",
        out,
        report.tensors,
        report.merged,
        report.bytes_written / 2**20,
    )
    if probe is not None:
        dtype = torch_dtype(config.base.compute_dtype)
        found = verify_directory(out, probe, dtype)
        log.info("reloaded in transformers as %s, merged into the %s base: %s", dtype, into, found)
        rows = [
            ("Merged into", f"{into} base"),
            ("Reloaded by", f"transformers, {config.base.compute_dtype}"),
        ]
        add_section(run_dir, Section("Merge", rows=tuple(rows + found.rows())))


def _run_config(run_dir: Path) -> RunConfig:
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is no run directory: it has no config.yaml")
    if not (run_dir / "adapter").is_dir():
        raise UserError(f"{run_dir} has no adapter/ yet: the run did not finish; resume it first")
    return load_config(run_dir / "config.yaml")


def _only_one(world: World) -> None:
    if world.size > 1:
        raise UserError(f"this verb runs in one process, not {world.size}; start it with python")
