"""``peft`` and ``peft-expanded``: the adapter alone, in the format of Hugging Face PEFT."""

from collections.abc import Mapping
from typing import Any

import torch

from dist_peft.adapters.adapter_format import find_format
from dist_peft.adapters.directory import (
    check_public_adapter,
    read_adapter_directory,
    write_adapter_directory,
)
from dist_peft.adapters.export_limits import ExportContent
from dist_peft.adapters.metadata import read_adapter_metadata
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.adapters.qalora.format import expand_to_plain_lora, to_pooled_peft
from dist_peft.core.errors import UserError
from dist_peft.export.formats.export_format import ExportFormat
from dist_peft.export.formats.export_spec import ExportResult, ExportSpec
from dist_peft.export.model_directory import (
    WriteResult,
    copy_tokenizer_files,
)
from dist_peft.export.rounding_floor import RoundingFloor, measure_rounding_floor
from dist_peft.export.time_limit import VerificationSkipped, enforce_time_limit
from dist_peft.export.verify import Comparison
from dist_peft.export.verify_adapter import (
    compute_adapter_logits,
    compute_base_logits,
    verify_adapter,
)
from dist_peft.export.verify_formats import Consumer, ConsumerRequest, TransformersConsumer
from dist_peft.model.hub import resolve_base_directory
from dist_peft.store.publish import publish_directory

__all__ = ["PeftExpandedExport", "PeftExport"]


class PeftExport(ExportFormat):
    """PEFT's directory. LoRA is the same in both formats; QA-LoRA is PEFT's own here."""

    name = "peft"
    keeps = "the adapter; PiSSA and LoftQ as the change since initialization"
    loads_with = "PEFT"
    reads_base = False

    def get_content(self, options: Mapping[str, Any]) -> ExportContent:
        return "adapter"

    def convert_adapter(self, public: PublicAdapter) -> PublicAdapter:
        """Return the adapter as it is written."""
        return to_pooled_peft(public)

    def write_export(self, job: ExportSpec) -> ExportResult:
        job.check_output()
        public = read_adapter_directory(job.adapter_dir)
        check_public_adapter(public)  # a damaged one is refused, not copied
        known = find_format(public.config)
        assert known is not None  # read_adapter_directory refuses others
        if reason := known.explain_no_peft_form(public.config):
            other = "dist-peft eval --run reads the run itself"
            if not known.peft_types:
                other = f"{job.adapter_dir} already is in the format of AdapterHub's library"
            raise UserError(f"{job.adapter_dir.parent} {reason}; {other}")
        # only tensors and settings are copied: other files of the directory are not trusted
        written = self.convert_adapter(public)
        with publish_directory(job.out) as out:
            write_adapter_directory(out, written, read_adapter_metadata(job.adapter_dir))
            copy_tokenizer_files(job.adapter_dir, out)
        size = sum(path.stat().st_size for path in job.out.glob("*.safetensors"))
        counts = WriteResult(len(written.tensors), 0, 0, size)
        return ExportResult(counts, job.out, "PEFT adapter", exact=True)

    verification_limit = "QA-LoRA, see peft-expanded"

    @property
    def consumers(self) -> tuple[Consumer, ...]:
        return (TransformersConsumer(needs=("peft",)),)

    def verify_export(self, job: ExportSpec, request: ConsumerRequest) -> tuple[str, Comparison]:
        if job.pooled:
            raise VerificationSkipped(
                "PEFT applies its own QA-LoRA to GPTQ linears only; --format peft-expanded is the "
                "same adapter as plain LoRA"
            )
        return self.verify_with_peft(job, request)

    def verify_with_peft(self, job: ExportSpec, request: ConsumerRequest) -> tuple[str, Comparison]:
        """Apply the adapter with PEFT to the base as training saw it."""
        with enforce_time_limit("loading it with PEFT", request.seconds):
            base = resolve_base_directory(job.base)
            return verify_adapter(job.base, base, job.adapter_dir, request.path, request.probe)

    def measure_rounding(
        self, job: ExportSpec, request: ConsumerRequest, *, by_blocks: bool
    ) -> RoundingFloor | None:
        labels = read_adapter_metadata(job.adapter_dir).get("labels", ())
        probe, dtype = request.probe, torch.float32
        with enforce_time_limit("loading it again in float32", request.seconds):
            files = resolve_base_directory(job.base)
            output = compute_adapter_logits(job.base, files, labels, request.path, probe, dtype)
            base = compute_base_logits(job.base, files, labels, probe.input_ids, dtype)
        return measure_rounding_floor(output, base, probe)

    def describe_result(self, result: ExportResult) -> str:
        return f"{result.how} {result.path}"

    def list_report_rows(
        self, job: ExportSpec, result: ExportResult, consumer: str
    ) -> list[tuple[str, str]]:
        return [("Loaded by", consumer)]

    def suggest_better(self, job: ExportSpec, result: ExportResult, found: Comparison) -> str:
        start = read_adapter_directory(job.adapter_dir, values=False).facts.get("start")
        if not start:
            return ""
        return (
            f"adapter.init {start} trained on the residual of the base, which no quantized base of "
            "PEFT is; of an NF4 base --format bnb-nf4 --keep-adapter keeps base and adapter as "
            "they were trained, or merge the run with --base decoded"
        )


class PeftExpandedExport(PeftExport):
    """The same with QA-LoRA as plain LoRA, for everything that reads LoRA."""

    name = "peft-expanded"
    keeps = "QA-LoRA as plain LoRA"
    verification_limit = ""

    def convert_adapter(self, public: PublicAdapter) -> PublicAdapter:
        return expand_to_plain_lora(public)

    def verify_export(self, job: ExportSpec, request: ConsumerRequest) -> tuple[str, Comparison]:
        return self.verify_with_peft(job, request)
