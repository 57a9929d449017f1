"""``bnb-nf4``: bitsandbytes' NF4, merged and re-quantized, or the codes of an NF4 base.

``formats.bnb_packer`` has the layout of merged weights, ``formats.kept_nf4`` that of kept codes.
"""

from collections.abc import Mapping
from typing import Any

from dist_peft.adapters.adapter_format import find_format
from dist_peft.adapters.directory import read_adapter_directory
from dist_peft.adapters.export_limits import ExportContent
from dist_peft.core.errors import UserError
from dist_peft.export.formats.bnb_packer import BnbNf4Packer
from dist_peft.export.formats.expert_layout import LLAMA4_LINEARS, ExpertLayout
from dist_peft.export.formats.export_format import (
    ExportForm,
    ExportOption,
    PackedExport,
    PlannedExport,
)
from dist_peft.export.formats.export_spec import ExportResult, ExportSpec
from dist_peft.export.formats.kept_nf4 import KeptNf4Packer
from dist_peft.export.verify import Comparison
from dist_peft.export.verify_bitsandbytes import verify_with_bitsandbytes
from dist_peft.export.verify_formats import Consumer, ConsumerRequest, TransformersConsumer
from dist_peft.quant.codec import make_codec

__all__ = ["BnbNf4Export"]

KEEP_ADAPTER = ExportOption(
    "keep-adapter",
    "the NF4 base's own codes and the adapter in its own directory; lossless",
    {"action": "store_true"},
)


class BnbNf4Export(PackedExport):
    """bitsandbytes' NF4."""

    name = "bnb-nf4"
    keeps = "merged, re-quantized to NF4; --keep-adapter: the base's codes, separate adapter"
    loads_with = "transformers with bitsandbytes (and PEFT)"
    options = (KEEP_ADAPTER,)
    experts = ExpertLayout(
        packed=False,
        linear_types=LLAMA4_LINEARS,
        separate_limit="bitsandbytes has no experts, whose codes could not be kept",
    )

    @property
    def forms(self) -> tuple[ExportForm, ...]:
        """Obstacles to a merge do not always apply to the kept codes."""
        kept = ExportForm(f"{self.name} --{KEEP_ADAPTER.name}", {KEEP_ADAPTER.key: True})
        return (*super().forms, kept)

    def get_content(self, options: Mapping[str, Any]) -> ExportContent:
        return "separate" if options.get(KEEP_ADAPTER.key) else "merged"

    def find_packing_obstacle(self, run: PlannedExport, options: Mapping[str, Any]) -> str | None:
        rows = run.codec.nf4_rows
        if not options.get(KEEP_ADAPTER.key):
            return self._find_block_obstacle(run) if run.limits.trained_codes and rows else None
        if rows is None:
            return "the base has no NF4 codes"
        try:
            packer = KeptNf4Packer(rows.group_size, run.compute_dtype)
            packer.check_model_linears(run.skeleton.model)
        except UserError as error:
            return str(error)
        return run.limits.bnb_linears

    def _find_block_obstacle(self, run: PlannedExport) -> str | None:
        """Return why no block size of bitsandbytes fits the trained codes."""
        rows = run.codec.nf4_rows
        try:
            KeptNf4Packer(rows.group_size if rows else 0, run.compute_dtype)
        except UserError as error:
            return str(error)
        return None

    def explain_no_adapter(self) -> str:
        return "so there is no adapter to keep; leave out --keep-adapter"

    def write_export(self, job: ExportSpec) -> ExportResult:
        if job.options.get(KEEP_ADAPTER.key):
            return self._write_kept_codes(job)
        quant = job.base.quant
        rows = make_codec(quant, job.compute_dtype).nf4_rows
        if job.trained_codes and rows is not None:
            kept = KeptNf4Packer(rows.group_size, job.compute_dtype)
            return self.write_directory(job, "trained", kept, "the trained codes", exact=True)
        packer = BnbNf4Packer(quant.double_quant if quant else True, job.compute_dtype)
        return self.write_directory(job, job.merge_state, packer, "merged, quantized to NF4")

    def _write_kept_codes(self, job: ExportSpec) -> ExportResult:
        rows = make_codec(job.base.quant, job.compute_dtype).nf4_rows
        if rows is None:
            raise UserError(
                "--keep-adapter keeps the codes of an NF4 base (base.quant.kind: nf4), and this "
                "run has none; "
                + (
                    "gptq and compressed-tensors keep the codes of an integer base and the adapter"
                    if job.base.quant
                    else "on a base that was not quantized, peft is the trained adapter"
                )
            )
        packer = KeptNf4Packer(rows.group_size, job.compute_dtype)
        known = find_format(read_adapter_directory(job.adapter_dir, values=False).config)
        if known is not None and not known.on_bnb_linears:
            raise UserError(
                "--keep-adapter keeps the adapter separate from linears of bitsandbytes, on which "
                "PEFT does not support this method; leave it out to merge, or choose hf-bf16"
            )
        job.check_output()
        with job.open_weights("base") as walk:
            packer.check_packable(walk)
        how = "base as trained; separate adapter"
        return self.write_directory(job, "base", packer, how, exact=True)

    @property
    def consumers(self) -> tuple[Consumer, ...]:
        return (TransformersConsumer(needs=("bitsandbytes",)),)

    def verify_export(self, job: ExportSpec, request: ConsumerRequest) -> tuple[str, Comparison]:
        return verify_with_bitsandbytes(request)
