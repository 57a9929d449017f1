"""``dist-peft merge`` and ``dist-peft export``: from a run directory to something others load."""

import argparse
import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from dist_peft.adapters.adapterhub_format import is_adapterhub
from dist_peft.adapters.fusion_format import is_fusion
from dist_peft.adapters.peft_format import (
    check_adapter,
    read_adapter,
    read_metadata,
    write_adapter,
)
from dist_peft.adapters.prompt_format import PLACED
from dist_peft.adapters.qalora_format import as_expanded, as_peft
from dist_peft.adapters.weights_format import holds_weights
from dist_peft.app.finished_run import load_finished_run
from dist_peft.app.report import add_section
from dist_peft.core.config import QaLoraConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import setup_log
from dist_peft.core.world import World
from dist_peft.export.formats import FORMATS, GGUF_TYPES, Job, export_model, format_table
from dist_peft.export.merge import merge_model
from dist_peft.export.sink import check_new
from dist_peft.export.verify import Probe, verify_directory
from dist_peft.export.verify_formats import NotVerified, verify_export
from dist_peft.model.hub import resolve_base
from dist_peft.model.skeleton import torch_dtype
from dist_peft.train.report import Section

__all__ = ["add_export_arguments", "export_run", "merge_run", "run_export", "run_merge"]

log = logging.getLogger("dist_peft")


def run_merge(args: argparse.Namespace, world: World) -> int:
    _only_one(world)
    setup_log(None, 0, 1)
    merge_run(
        args.run_dir,
        args.out,
        into=args.base or "original",
        verify=not args.no_verify,
        trust_remote_code=args.trust_remote_code,
    )
    return 0


def run_export(args: argparse.Namespace, world: World) -> int:
    _only_one(world)
    setup_log(None, 0, 1)
    _warn_of_unused(args)
    trust = args.trust_remote_code
    if args.format == "hf-bf16":
        into, verify = args.base or "original", not args.no_verify
        merge_run(args.run_dir, args.out, into=into, verify=verify, trust_remote_code=trust)
    elif args.format in _ADAPTERS:
        _write_adapter(args.run_dir, args.format, args.out)
    else:
        options = {
            "into": args.base or "original",
            "bits": args.bits,
            "group_size": args.group_size,
            "kind": args.type,
            "merge": args.merge,
            "lossy": args.lossy,
        }
        export_run(
            args.run_dir,
            args.format,
            args.out,
            options,
            verify=not args.no_verify,
            trust_remote_code=trust,
        )
    return 0


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``export`` takes beside the arguments of ``merge``."""
    names = ", ".join(FORMATS)
    parser.add_argument(
        "--list", action=_ListFormats, help="print what each format preserves and who loads it"
    )
    parser.add_argument(
        "--format", required=True, choices=FORMATS, metavar="NAME", help=f"one of {names}"
    )
    for name, (kwargs, formats) in _OPTIONS.items():
        text = f"{', '.join(formats)}: {kwargs['help']}"
        parser.add_argument(f"--{name}", **{**kwargs, "help": text})


_INTEGER_ZERO = ("gptq", "compressed-tensors")
_AFFINE = ("mlx", "hf-metal", *_INTEGER_ZERO)
_OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "bits": (
        {"type": int, "choices": (2, 3, 4, 8), "help": "default: an integer base's own, else 4"},
        _AFFINE,
    ),
    "group-size": ({"type": int, "help": "default: an integer base's own, else 64"}, _AFFINE),
    "type": (
        {"choices": GGUF_TYPES, "help": "default: q4_1 where it keeps QA-LoRA's codes, else q8_0"},
        ("gguf",),
    ),
    "merge": (
        {"action": "store_true", "help": "one merged model instead of base and adapter"},
        _INTEGER_ZERO,
    ),
    "lossy": (
        {"action": "store_true", "help": "allow --merge, which rounds most of the adapter away"},
        _INTEGER_ZERO,
    ),
}
"""Option -> its argparse settings, and the formats that it changes."""


class _ListFormats(argparse.Action):
    """``--list``: print the table and leave, as ``--help`` does."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(format_table())
        parser.exit()


def _warn_of_unused(args: argparse.Namespace) -> None:
    for name, (_, formats) in _OPTIONS.items():
        if getattr(args, name.replace("-", "_")) and args.format not in formats:
            log.warning("--%s has no effect on format %s", name, args.format)
    if args.lossy and not args.merge and args.format in _INTEGER_ZERO:
        log.warning("--lossy has no effect without --merge")
    beside = args.format in _INTEGER_ZERO and not args.merge
    if args.base and (args.format in _ADAPTERS or beside):
        log.warning("--base has no effect where nothing is merged")


_ADAPTERS = {"peft": as_peft, "peft-expanded": as_expanded}
"""Format of an adapter -> how QA-LoRA is written in it; LoRA is the same in both."""


def _write_adapter(run_dir: Path, name: str, out: Path) -> None:
    load_finished_run(run_dir)  # neither model nor tokenizer is made: no trust is needed
    check_new(out)
    adapter = run_dir / "adapter"
    public = read_adapter(adapter)
    check_adapter(public)  # a damaged one is refused, not copied
    if is_adapterhub(public.config):
        kind = "fusion" if is_fusion(public.config) else "bottleneck"
        raise UserError(
            f"{run_dir} was trained with adapter.kind {kind}, which PEFT does not have; "
            f"{adapter} already is what AdapterHub's library loads"
        )
    if public.config["peft_type"] == PLACED:
        raise UserError(
            f"{run_dir} was trained with adapter.pseudo_token, and PEFT puts virtual tokens in "
            "front only: there is no PEFT form of it; dist-peft eval --run reads the run itself"
        )
    try:
        shutil.copytree(adapter, out, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        raise UserError(f"cannot write {out}: {error}; choose another directory") from None
    written = _ADAPTERS[name](public)
    if written is not public:
        write_adapter(out, written, read_metadata(adapter))
    log.info("wrote PEFT adapter %s", out)


@torch.no_grad()
def export_run(
    run_dir: Path,
    name: str,
    out: Path,
    options: dict[str, Any],
    *,
    verify: bool = True,
    trust_remote_code: bool = False,
) -> None:
    """Write a quantized format and, unless told otherwise, load it with its consumer and compare.

    Args:
        run_dir: a finished run.
        name: a format of ``export.formats.export_model``.
        out: new directory, or a new ``.gguf`` file.
        options: further fields of ``export.formats.Job``.
        verify: the probe must be there.
        trust_remote_code: the caller's command line allows the base's code to run.
    """
    config = load_finished_run(run_dir, trust_remote_code=trust_remote_code)
    if config.base.head == "classifier":
        raise UserError(
            f"{run_dir} trained a classifier, and format {name} is for language models: no library "
            "that reads it was found to load such a head; use hf-bf16 (dist-peft merge) or peft"
        )
    if holds_weights(run_dir / "adapter") and name in _INTEGER_ZERO and not options.get("merge"):
        raise UserError(
            f"{run_dir} trained weights of the base (adapter.kind {config.adapter.kind}), so there "
            f"is no adapter to lie beside the base in format {name}; use dist-peft merge, another "
            "format, or --merge --lossy"
        )
    probe = Probe.load(run_dir / "probe.safetensors") if verify else None
    pooled = isinstance(config.adapter, QaLoraConfig)
    if pooled and options.get("into") == "decoded":
        log.warning("--base has no effect on a QA-LoRA run: the codes of its base are kept")
    directory = resolve_base(config.base)
    job = Job(config.base, directory, run_dir / "adapter", out, pooled, **options)
    exported = export_model(name, job)
    written = exported.written
    log.info(
        "wrote %s, %s: %d weights packed, %.1f MiB",
        exported.path,
        exported.how,
        written.packed,
        written.bytes_written / 2**20,
    )
    if written.unpacked:
        log.warning(
            "%d linears stay %s, since groups do not divide them, such as %s",
            len(written.unpacked),
            config.base.compute_dtype,
            written.unpacked[0],
        )
    if probe is None:
        return
    try:
        consumer, found = verify_export(name, exported.path, probe, job.dtype)
    except NotVerified as error:
        log.warning("NOT VERIFIED: %s", error)
        return
    log.info("loaded by %s: %s", consumer, found)
    rows = [("Written", exported.how), ("Loaded by", consumer), *found.rows()]
    add_section(run_dir, Section(f"Export {name}", rows=tuple(rows)))


@torch.no_grad()
def merge_run(
    run_dir: Path,
    out: Path,
    *,
    into: str = "original",
    verify: bool = True,
    trust_remote_code: bool = False,
) -> None:
    """Merge a finished run and, unless told otherwise, reload the result and compare logits.

    ``trust_remote_code``: the caller's command line allows the base's code to run.
    """
    config = load_finished_run(run_dir, trust_remote_code=trust_remote_code)
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


def _only_one(world: World) -> None:
    if world.size > 1:
        raise UserError(f"this verb runs in one process, not {world.size}; start it with python")
