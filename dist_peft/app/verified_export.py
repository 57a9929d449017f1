"""Merge or export a finished run, compute with the result and compare logits: by its consumer, or
block by block."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from dist_peft.adapters.full.format import contains_trained_weights
from dist_peft.adapters.method_table import make_adapter
from dist_peft.app.finished_run import load_finished_run
from dist_peft.app.model_card import write_model_card
from dist_peft.app.output_places import refuse_taken_place
from dist_peft.app.report_files import add_report_section
from dist_peft.app.run_consistency import check_tokenizer_of_base
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.host_memory import read_available_memory
from dist_peft.export.formats.export_format import ExportFormat, PackedExport
from dist_peft.export.formats.export_spec import ExportResult, ExportSpec
from dist_peft.export.formats.hf_bf16 import HfBf16Export
from dist_peft.export.formats.registry import FORMATS
from dist_peft.export.rounding_floor import RoundingFloor
from dist_peft.export.time_limit import VerificationSkipped
from dist_peft.export.verdict import is_above_exact_bound, judge_comparison
from dist_peft.export.verification_choice import (
    CONSUMER_SHARE,
    AskedVerification,
    Verification,
    choose_verification,
    count_loaded_bytes,
)
from dist_peft.export.verify import Comparison, Probe
from dist_peft.export.verify_formats import ConsumerRequest
from dist_peft.model.hub import resolve_base_directory
from dist_peft.model.skeleton import parse_torch_dtype
from dist_peft.train.report_page import ReportSection

__all__ = [
    "VERIFY",
    "ExportOutcome",
    "VerificationOptions",
    "choose_export_verification",
    "export_finished_run",
    "merge_finished_run",
]

log = logging.getLogger("dist_peft")


@dataclass(frozen=True)
class VerificationOptions:
    """Options of the comparison of an export with the trained model.

    Attributes:
        max_error: bound that replaces the form's, as a share of the change by training.
        seconds: time limit of the consumer.
        verifier: who computes (``export.verification_choice``).
    """

    max_error: float | None = None
    seconds: float = 600.0
    verifier: AskedVerification = "auto"


VERIFY = VerificationOptions()


@dataclass(frozen=True)
class ExportOutcome:
    """A written export and the comparison with the trained model.

    Attributes:
        format_name: of ``export.formats.registry.FORMATS``.
        result: the written file or directory.
        consumer: the library that loaded it; None: it was not compared.
        comparison: with the trained model.
        rounding: the second look in float32, where the comparison needed one.
    """

    format_name: str
    result: ExportResult
    consumer: str | None = None
    comparison: Comparison | None = None
    rounding: RoundingFloor | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields of ``--json``."""
        return {
            "format": self.format_name,
            "path": str(self.result.path),
            "conversion": self.result.how,
            "exact": self.result.exact,
            "unpacked": list(self.result.written.unpacked),
            "loaded_by": self.consumer,
            "comparison": None if self.comparison is None else asdict(self.comparison),
            "rounding": None if self.rounding is None else asdict(self.rounding),
        }


@torch.no_grad()
def export_finished_run(
    run_dir: Path,
    name: str,
    out: Path,
    options: Mapping[str, Any],
    *,
    into: Literal["original", "decoded"] = "original",
    verify: VerificationOptions | None = VERIFY,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> ExportOutcome:
    """Write a format and, unless disabled, load it with its consumer and compare.

    Args:
        run_dir: a finished run.
        name: a format of ``export.formats.registry.FORMATS``.
        out: new directory, or a new ``.gguf`` file.
        options: values of the format's options by key.
        into: ``original`` merges into the base's files, ``decoded`` into the dequantized base as
            training used it.
        verify: options of the comparison, which needs the run's probe; None: no comparison.
        trust_remote_code: the caller's command line allows the base's code to run.
        overwrite: replace an export that is in ``out``.

    Raises:
        UserError: the format does not support the run, or ``out`` cannot be written.
        VerificationError: the written model is not the trained one.
    """
    refuse_taken_place(out, "--out")
    known = FORMATS[name]
    config = load_finished_run(run_dir, trust_remote_code=trust_remote_code)
    _refuse_unfit_run(config, run_dir, known, options)
    probe = Probe.load_probe(run_dir / "probe.safetensors") if verify else None
    job = _make_export_spec(config, run_dir, known, out, options, into)
    if known.reads_base:
        check_tokenizer_of_base(run_dir, job.directory, config.base.trust_remote_code)
    job = replace(job, overwrite=overwrite)
    if job.pooled and into == "decoded" and isinstance(known, PackedExport):
        log.warning("--base has no effect on a QA-LoRA run: the codes of its base are kept")
    verifier: Verification | None = None
    if verify is not None:
        needed = int(known.loaded_share * count_loaded_bytes(job.directory, job.compute_dtype))
        verifier = choose_export_verification(known, needed, verify.verifier)
    result = known.write_export(job)
    log.info("wrote %s", known.describe_result(result))
    write_model_card(run_dir, out if out.is_dir() else result.path, name)
    if result.written.unpacked:
        log.warning(
            "%d linears stay %s, since groups do not divide them, such as %s",
            len(result.written.unpacked),
            config.base.compute_dtype,
            result.written.unpacked[0],
        )
    if probe is not None and verify is not None and verifier is not None:
        return _verify_export(known, job, result, run_dir, probe, verify, verifier)
    return ExportOutcome(known.name, result)


def _make_export_spec(
    config: RunConfig,
    run_dir: Path,
    known: ExportFormat,
    out: Path,
    options: Mapping[str, Any],
    into: Literal["original", "decoded"],
) -> ExportSpec:
    dtype = parse_torch_dtype(config.base.compute_dtype)
    adapter = make_adapter(config.adapter, seed=config.train.seed, arithmetic=dtype)
    limits = adapter.get_export_limits(tied=False)
    if limits.trained_codes:
        into = "decoded"  # of the trained codes: no other rows are the trained ones
    # PEFT's formats are written without the base, which may be elsewhere by now
    directory = resolve_base_directory(config.base) if known.reads_base else Path(config.base.path)
    return ExportSpec(
        config.base,
        directory,
        run_dir / "adapter",
        out,
        pooled=limits.fits_zero_points,
        trained_codes=limits.trained_codes,
        into=into,
        options=options,
    )


def choose_export_verification(
    known: ExportFormat, needed: int, asked: AskedVerification
) -> Verification:
    """Return how the output of a format will be compared; before it is written.

    Args:
        needed: bytes of the output once its library has loaded it.

    Raises:
        UserError: the host's memory is too small for that.
    """
    available = read_available_memory()
    chosen = choose_verification(
        asked, needed, available, library=known.loads_with, has_blocks=known.has_blocks
    )
    if chosen == "blocks" and asked == "auto":
        log.info(
            "the result will be compared block by block: loaded whole with %s it takes about "
            "%.1f GiB, more than %.0f %% of the %.1f GiB that are available",
            known.loads_with,
            needed / 2**30,
            100 * CONSUMER_SHARE,
            available / 2**30,
        )
    return chosen


def _verify_export(
    known: ExportFormat,
    job: ExportSpec,
    result: ExportResult,
    run_dir: Path,
    probe: Probe,
    verify: VerificationOptions,
    verifier: Verification,
) -> ExportOutcome:
    """Compare with the trained model, add the figures to the run's report, and judge.

    Raises:
        VerificationError: the written model is not the trained one.
    """
    trust = job.base.trust_remote_code
    request = ConsumerRequest(result.path, probe, job.compute_dtype, verify.seconds, trust)
    try:
        if verifier == "blocks":
            consumer, found = known.verify_blocks(job, probe)
        else:
            consumer, found = known.verify_export(job, request)
    except VerificationSkipped as error:
        log.warning("NOT VERIFIED: %s", error)
        return ExportOutcome(known.name, result)
    log.info("loaded by %s: %s", consumer, found)
    rounding = None
    if result.exact and verify.max_error is None and is_above_exact_bound(found):
        rounding = _measure_rounding(known, job, request, by_blocks=verifier == "blocks")
    rows = (
        *known.list_report_rows(job, result, consumer),
        *found.format_rows(),
        *(() if rounding is None else rounding.format_rows()),
    )
    add_report_section(run_dir, ReportSection(known.report_title, rows=rows))
    judge_comparison(
        found,
        result.path,
        exact=result.exact,
        max_error=verify.max_error,
        hint=known.suggest_better(job, result, found),
        rounding=rounding,
    )
    return ExportOutcome(known.name, result, consumer, found, rounding)


def _measure_rounding(
    known: ExportFormat, job: ExportSpec, request: ConsumerRequest, *, by_blocks: bool
) -> RoundingFloor | None:
    """Compute the figures of the second look in float32; None: of a run in float32, or of a form
    or a host that has no such look."""
    if job.compute_dtype.itemsize > 2:
        return None
    try:
        if not by_blocks:
            needed = count_loaded_bytes(resolve_base_directory(job.base), torch.float32)
            available = read_available_memory()
            if needed > available:
                raise VerificationSkipped(
                    f"float32 takes {needed / 2**30:.1f} GiB, of which {available / 2**30:.1f} GiB "
                    "are available"
                )
        return known.measure_rounding(job, request, by_blocks=by_blocks)
    except VerificationSkipped as error:
        log.warning("the rounding of 16-bit training was not measured: %s", error)
        return None


def _refuse_unfit_run(
    config: RunConfig, run_dir: Path, known: ExportFormat, options: Mapping[str, Any]
) -> None:
    """Refuse a run that a format cannot hold.

    Raises:
        UserError: it cannot; names the formats that can.
    """
    if config.base.head == "classifier" and known.classifier_limit:
        raise UserError(
            f"{run_dir} trained a classifier, and format {known.name} is for language models: "
            f"{known.classifier_limit}; use hf-bf16 (dist-peft merge) or peft"
        )
    limits = make_adapter(
        config.adapter, seed=config.train.seed, arithmetic=torch.float32
    ).get_export_limits(tied=False)
    content = known.get_run_content(options, limits)
    if limits.trained_codes and (reason := limits.get_reason(content)):
        raise UserError(f"{run_dir} is not written as {known.name}: {reason}")
    separate = content == "separate"
    if separate and contains_trained_weights(run_dir / "adapter"):
        raise UserError(
            f"{run_dir} trained weights of the base (adapter.kind {config.adapter.kind}), "
            f"{known.explain_no_adapter()}"
        )


def merge_finished_run(
    run_dir: Path,
    out: Path,
    *,
    into: Literal["original", "decoded"] = "original",
    dtype: str = "bfloat16",
    keep_zeros: bool = False,
    verify: VerificationOptions | None = VERIFY,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> ExportOutcome:
    """Merge a finished run and, unless disabled, reload the result and compare logits.

    Args:
        dtype: type of the merged weights.
        keep_zeros: block weights that are exactly 0 in the base stay 0.
        run_dir, out, into, verify, trust_remote_code, overwrite: see ``export_finished_run``.

    Raises:
        UserError: the run cannot be merged, or ``out`` cannot be written.
        VerificationError: the merged model is not the trained one.
    """
    return export_finished_run(
        run_dir,
        HfBf16Export.name,
        out,
        {"dtype": dtype, "keep_zeros": keep_zeros},
        into=into,
        verify=verify,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
    )
