"""``hf-bf16``: a plain Hugging Face directory of base and adapter, also written by ``merge``."""

import logging
from typing import Literal

from dist_peft.adapters.directory import keeps_zeros_of_base
from dist_peft.adapters.metadata import read_adapter_metadata
from dist_peft.core.errors import UserError
from dist_peft.export.formats.export_format import ExportFormat
from dist_peft.export.formats.export_spec import ExportResult, ExportSpec
from dist_peft.export.merge_weights import merge_model
from dist_peft.export.time_limit import enforce_time_limit
from dist_peft.export.verify import Comparison, Probe, verify_directory
from dist_peft.export.verify_blocks import verify_by_blocks
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


def _cuts_zeros(job: ExportSpec) -> bool:
    """Return whether a part of the trained change is left out."""
    return bool(job.options.get("keep_zeros")) and not keeps_zeros_of_base(job.adapter_dir)


def _get_dtype(job: ExportSpec) -> str:
    return str(job.options.get("dtype") or "bfloat16")
