"""Merge or export a finished run, load the result with its consumer and compare logits."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dist_peft.adapters.full.format import contains_trained_weights
from dist_peft.app.export_adapter import VERIFY, VerificationOptions
from dist_peft.app.export_options import INTEGER_ZERO
from dist_peft.app.finished_run import load_finished_run
from dist_peft.app.output_places import refuse_taken_place
from dist_peft.app.run_consistency import check_tokenizer_of_base
from dist_peft.app.run_report import add_report_section
from dist_peft.core.config.run import QaLoraConfig, RunConfig
from dist_peft.core.errors import UserError
from dist_peft.export.formats.export_spec import ExportSpec
from dist_peft.export.formats.registry import export_model
from dist_peft.export.merge_weights import merge_model
from dist_peft.export.time_limit import VerificationSkipped, enforce_time_limit
from dist_peft.export.verdict import judge_comparison
from dist_peft.export.verify import Probe, verify_directory
from dist_peft.export.verify_formats import verify_with_consumer
from dist_peft.model.hub import read_json_object, resolve_base_directory
from dist_peft.model.skeleton import parse_torch_dtype
from dist_peft.train.report import ReportSection

__all__ = ["export_finished_run", "merge_finished_run"]

log = logging.getLogger("dist_peft")


@torch.no_grad()
def export_finished_run(
    run_dir: Path,
    name: str,
    out: Path,
    options: dict[str, Any],
    *,
    verify: VerificationOptions | None = VERIFY,
    trust_remote_code: bool = False,
) -> None:
    """Write a quantized format and, unless disabled, load it with its consumer and compare.

    Args:
        run_dir: a finished run.
        name: a format of ``export.formats.registry.export_model``.
        out: new directory, or a new ``.gguf`` file.
        options: further fields of ``export.formats.registry.ExportSpec``.
        verify: options of the comparison, which needs the run's probe; None: no comparison.
        trust_remote_code: the caller's command line allows the base's code to run.

    Raises:
        UserError: the format does not support the run, or ``out`` cannot be written.
        VerificationError: the written model is not the trained one.
    """
    refuse_taken_place(out, "--out")
    config = load_finished_run(run_dir, trust_remote_code=trust_remote_code)
    _refuse_unfit_run(config, run_dir, name, options)
    probe = Probe.load_probe(run_dir / "probe.safetensors") if verify else None
    pooled = isinstance(config.adapter, QaLoraConfig)
    if pooled and options.get("into") == "decoded":
        log.warning("--base has no effect on a QA-LoRA run: the codes of its base are kept")
    directory = resolve_base_directory(config.base)
    check_tokenizer_of_base(run_dir, directory, config.base.trust_remote_code)
    job = ExportSpec(config.base, directory, run_dir / "adapter", out, pooled, **options)
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
    if probe is None or verify is None:
        return
    trust = config.base.trust_remote_code
    try:
        consumer, found = verify_with_consumer(
            name, exported.path, probe, job.compute_dtype, verify.seconds, trust_remote_code=trust
        )
    except VerificationSkipped as error:
        log.warning("NOT VERIFIED: %s", error)
        return
    log.info("loaded by %s: %s", consumer, found)
    rows = [("Written", exported.how), ("Loaded by", consumer), *found.format_rows()]
    add_report_section(run_dir, ReportSection(f"Export {name}", rows=tuple(rows)))
    hint = "" if exported.exact else "--base decoded, or more bits, lose less"
    judge_comparison(
        found, exported.path, exact=exported.exact, max_error=verify.max_error, hint=hint
    )


def _refuse_unfit_run(
    config: RunConfig, run_dir: Path, name: str, options: Mapping[str, Any]
) -> None:
    """Refuse a run that format ``name`` cannot hold.

    Raises:
        UserError: it cannot; names the formats that can.
    """
    if config.base.head == "classifier":
        raise UserError(
            f"{run_dir} trained a classifier, and format {name} is for language models: no library "
            "that reads it was found to load such a head; use hf-bf16 (dist-peft merge) or peft"
        )
    if (
        contains_trained_weights(run_dir / "adapter")
        and name in INTEGER_ZERO
        and not options.get("merge")
    ):
        raise UserError(
            f"{run_dir} trained weights of the base (adapter.kind {config.adapter.kind}), so there "
            f"is no separate adapter for format {name}; use dist-peft merge, another "
            "format, or --merge --lossy"
        )
    if contains_trained_weights(run_dir / "adapter") and options.get("keep_adapter"):
        raise UserError(
            f"{run_dir} trained weights of the base (adapter.kind {config.adapter.kind}), so there "
            "is no adapter to keep; leave out --keep-adapter"
        )


@torch.no_grad()
def merge_finished_run(
    run_dir: Path,
    out: Path,
    *,
    into: str = "original",
    dtype: str = "bfloat16",
    verify: VerificationOptions | None = VERIFY,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> None:
    """Merge a finished run and, unless disabled, reload the result and compare logits.

    Args:
        run_dir: a finished run.
        out: new directory.
        into: ``original`` merges into the base's files, ``decoded`` into the dequantized base as
            training used it.
        dtype: type of the merged weights.
        verify: options of the comparison, which needs the run's probe; None: no comparison.
        trust_remote_code: the caller's command line allows the base's code to run.
        overwrite: replace an export that is in ``out``.

    Raises:
        UserError: the run cannot be merged, or ``out`` cannot be written.
        VerificationError: the merged model is not the trained one.
    """
    refuse_taken_place(out, "--out")
    config = load_finished_run(run_dir, trust_remote_code=trust_remote_code)
    probe = Probe.load_probe(run_dir / "probe.safetensors") if verify else None
    directory = resolve_base_directory(config.base)
    check_tokenizer_of_base(run_dir, directory, config.base.trust_remote_code)
    as_trained = (
        into == "decoded"
        or config.base.quant is None
        or "quantization_config" in read_json_object(directory / "config.json")
    )
    report = merge_model(
        config.base,
        directory,
        run_dir / "adapter",
        out,
        into="decoded" if into == "decoded" else "original",
        dtype=parse_torch_dtype(dtype),
        overwrite=overwrite,
    )
    log.info(
        "wrote %s: %d tensors, %d of them merged, %.1f MiB, %s",
        out,
        report.tensors,
        report.merged,
        report.bytes_written / 2**20,
        dtype,
    )
    if probe is None or verify is None:
        return
    compute = parse_torch_dtype(config.base.compute_dtype)
    trust = config.base.trust_remote_code
    try:
        with enforce_time_limit("loading it with transformers", verify.seconds):
            found = verify_directory(out, probe, compute, trust_remote_code=trust)
    except VerificationSkipped as error:
        log.warning("NOT VERIFIED: %s", error)
        return
    log.info("reloaded in transformers as %s, merged into the %s base: %s", compute, into, found)
    rows = [
        ("Merged into", f"{into} base"),
        ("Type of the weights", dtype),
        ("Reloaded by", f"transformers, {config.base.compute_dtype}"),
    ]
    add_report_section(run_dir, ReportSection("Merge", rows=tuple(rows + found.format_rows())))
    may_be_rounding = dtype != "float32" and found.relative < 1  # NaN is not below either
    hint = "--dtype float32 rounds nothing" if may_be_rounding else ""
    if not as_trained:
        hint = "--base decoded merges into the base as training saw it"
    judge_comparison(found, out, exact=as_trained, max_error=verify.max_error, hint=hint)
