"""``hf-bf16``: a plain Hugging Face directory of base and adapter, also written by ``merge``."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dist_peft.adapters.directory import keeps_zeros_of_base
from dist_peft.adapters.metadata import read_adapter_metadata
from dist_peft.core.errors import UserError
from dist_peft.export.formats.export_format import ExportFormat
from dist_peft.export.formats.export_spec import ExportResult, ExportSpec
from dist_peft.export.merge_weights import merge_model
from dist_peft.export.rounding_floor import RoundingFloor, measure_rounding_floor
from dist_peft.export.time_limit import enforce_time_limit
from dist_peft.export.verify import (
    Comparison,
    Probe,
    compute_directory_logits,
    verify_directory,
)
from dist_peft.export.verify_adapter import compute_base_logits
from dist_peft.export.verify_blocks import (
    compute_logits_by_blocks,
    shorten_probe,
    verify_by_blocks,
)
from dist_peft.export.verify_formats import Consumer, ConsumerRequest, TransformersConsumer
from dist_peft.model.hub import read_json_object
from dist_peft.model.skeleton import parse_torch_dtype

__all__ = ["HfBf16Export"]

log = logging.getLogger("dist_peft")


class HfBf16Export(ExportFormat):
    """Merged weights in one floating-point type: bf16, or with ``merge`` the option ``dtype``."""

    name = "hf-bf16"
    keeps = "merged weights, rounded to bf16"
    loads_with = "transformers"
    has_blocks = True

    def write_export(self, job: ExportSpec) -> ExportResult:
        dtype, keep_zeros = _get_dtype(job), _cuts_zeros(job)
        kept = keep_zeros or keeps_zeros_of_base(job.adapter_dir)
        into: Literal["original", "decoded"] = job.into
        if keep_zeros and into == "decoded":
            raise UserError(
                "--keep-zeros takes zeros from the base's files, and --base decoded merges into "
                "rows that may be rounded to further zeros; leave out --base decoded"
            )
        written = merge_model(
            job.base,
            job.directory,
            job.adapter_dir,
            job.out,
            into=into,
            dtype=parse_torch_dtype(dtype),
            chunk_bytes=job.chunk_bytes,
            overwrite=job.overwrite,
            keep_zeros=keep_zeros,
        )
        as_trained = not keep_zeros and (
            into == "decoded"
            or job.base.quant is None
            or "quantization_config" in read_json_object(job.directory / "config.json")
        )
        how = f"merged into the {into} base, {dtype}" + ", zeros kept" * kept
        return ExportResult(written, job.out, how, as_trained)

    @property
    def consumers(self) -> tuple[Consumer, ...]:
        return (TransformersConsumer(),)

    def verify_export(self, job: ExportSpec, request: ConsumerRequest) -> tuple[str, Comparison]:
        with enforce_time_limit("loading it with transformers", request.seconds):
            found = verify_directory(
                request.path,
                request.probe,
                request.dtype,
                trust_remote_code=request.trust_remote_code,
            )
        return f"transformers, {job.base.compute_dtype}", found

    def measure_rounding(
        self, job: ExportSpec, request: ConsumerRequest, *, by_blocks: bool
    ) -> RoundingFloor | None:
        labels = read_adapter_metadata(job.adapter_dir).get("labels", ())
        if by_blocks:
            return _measure_by_blocks(job, request.probe, labels)
        ids = request.probe.input_ids
        with enforce_time_limit("loading it again in float32", request.seconds):
            output = compute_directory_logits(
                request.path,
                ids,
                torch.float32,
                trust_remote_code=request.trust_remote_code,
            )
            base = compute_base_logits(job.base, job.directory, labels, ids, torch.float32)
        return measure_rounding_floor(output, base, request.probe)

    def verify_blocks(self, job: ExportSpec, probe: Probe) -> tuple[str, Comparison]:
        base = job.base.model_copy(
            update={"path": str(job.out), "quant": None, "attention": "auto"}
        )
        labels = read_adapter_metadata(job.adapter_dir).get("labels", ())
        found = verify_by_blocks(base, job.out, probe, labels)
        return f"dist_peft, block by block, {job.base.compute_dtype}", found

    @property
    def report_title(self) -> str:
        return "Merge"

    def describe_result(self, result: ExportResult) -> str:
        written, size = result.written, result.written.bytes_written / 2**20
        return (
            f"{result.path}, {result.how}: {written.tensors} tensors, {written.merged} of them "
            f"merged, {size:.1f} MiB"
        )

    def list_report_rows(
        self, job: ExportSpec, result: ExportResult, consumer: str
    ) -> list[tuple[str, str]]:
        return [
            ("Merged into", f"{job.into} base"),
            ("Type of the weights", _get_dtype(job)),
            *([("Zeros of the base", "kept")] if ", zeros kept" in result.how else []),
            ("Reloaded by", consumer),
        ]

    def suggest_better(self, job: ExportSpec, result: ExportResult, found: Comparison) -> str:
        if _cuts_zeros(job):
            return (
                "--keep-zeros leaves out the change of weights that are zero in the base; a run "
                "with adapter.keep_zeros trains without it"
            )
        if not result.exact:
            return "--base decoded merges into the base as training saw it"
        # NaN is not below either
        may_be_rounding = _get_dtype(job) != "float32" and found.relative < 1
        return "--dtype float32 rounds nothing" if may_be_rounding else ""


def _measure_by_blocks(
    job: ExportSpec, probe: Probe, labels: Sequence[str]
) -> RoundingFloor | None:
    """Compute block by block; None of a quantized base, whose files hold other weights."""
    if job.base.quant is not None or "quantization_config" in read_json_object(
        job.directory / "config.json"
    ):
        return None
    probe = shorten_probe(job.base, probe)

    def compute(directory: Path) -> Tensor:
        settings = {"path": str(directory), "attention": "auto", "compute_dtype": "float32"}
        base = job.base.model_copy(update=settings)
        return compute_logits_by_blocks(base, directory, probe.input_ids, labels)

    return measure_rounding_floor(compute(job.out), compute(job.directory), probe)


def _cuts_zeros(job: ExportSpec) -> bool:
    """Return whether a part of the trained change is left out."""
    return bool(job.options.get("keep_zeros")) and not keeps_zeros_of_base(job.adapter_dir)


def _get_dtype(job: ExportSpec) -> str:
    return str(job.options.get("dtype") or "bfloat16")
