"""The formats of ``dist-peft export``.

The content of an export depends on the run. With QA-LoRA the adapter fits into the zeros of the
integer base: formats with float zeros or biases keep codes and scales of training. With LoRA the
merged rows are re-quantized. Formats with integer zeros keep an integer base unchanged and save the
adapter separately.
"""

from typing import Any

from dist_peft.export.formats.awq import AwqExport
from dist_peft.export.formats.bnb_nf4 import BnbNf4Export
from dist_peft.export.formats.bnb_others import BnbFp4Export, BnbInt8Export
from dist_peft.export.formats.export_format import ExportForm, ExportFormat
from dist_peft.export.formats.export_spec import ExportResult, ExportSpec
from dist_peft.export.formats.float_bias import HfMetalExport, MlxExport
from dist_peft.export.formats.fp8_format import Fp8Export
from dist_peft.export.formats.gguf_format import GgufExport
from dist_peft.export.formats.gguf_lora import GgufLoraExport
from dist_peft.export.formats.gptq_format import GptqExport
from dist_peft.export.formats.hf_bf16 import HfBf16Export
from dist_peft.export.formats.mlx_adapter import MlxAdapterExport
from dist_peft.export.formats.mxfp4_format import Mxfp4Export
from dist_peft.export.formats.nvfp4_format import Nvfp4Export
from dist_peft.export.formats.pack_quantized import CompressedTensorsExport
from dist_peft.export.formats.peft_adapter import PeftExpandedExport, PeftExport
from dist_peft.export.formats.peft_experts import PeftExpertsExport

__all__ = [
    "FORMATS",
    "describe_verification",
    "export_model",
    "list_export_forms",
    "list_format_facts",
    "render_format_table",
]

FORMATS: dict[str, ExportFormat] = {
    known.name: known
    for known in (
        HfBf16Export(),
        PeftExport(),
        PeftExpandedExport(),
        PeftExpertsExport(),
        BnbNf4Export(),
        BnbFp4Export(),
        BnbInt8Export(),
        GptqExport(),
        AwqExport(),
        CompressedTensorsExport(),
        Fp8Export(),
        Mxfp4Export(),
        Nvfp4Export(),
        MlxExport(),
        HfMetalExport(),
        GgufExport(),
        GgufLoraExport(),
        MlxAdapterExport(),
    )
}
"""Name on the command line -> format, in the order of lists and tables."""


def list_export_forms() -> list[tuple[ExportFormat, ExportForm]]:
    """Return the forms that a run can be exported in: the formats, and some with options."""
    return [(known, form) for known in FORMATS.values() for form in known.forms]


def export_model(name: str, job: ExportSpec) -> ExportResult:
    """Export a run in the format ``name``.

    Raises:
        UserError: the format cannot take the run, ``out`` is not empty, the disk is full.
    """
    return FORMATS[name].write_export(job)


def list_format_facts() -> list[dict[str, Any]]:
    """Return the formats with the libraries that compare them here, for JSON.

    Of each ``compared_by``, in order, the first one without ``missing`` modules loads an export for
    the comparison with the trained model.
    """
    return [
        {
            "format": known.name,
            "preserves": known.keeps,
            "loaded_by": known.loads_with,
            "compared_by": [
                {
                    "libraries": list(consumer.libraries),
                    "missing": list(consumer.list_missing()),
                    "python_variable": consumer.variable or None,
                }
                for consumer in known.consumers
            ],
            "not_compared": known.verification_limit or None,
            "block_by_block": known.has_blocks,
        }
        for known in FORMATS.values()
    ]


def describe_verification(known: ExportFormat) -> str:
    """Return the libraries that compare a format, and whether they are installed here, such as
    ``xllamacpp (not installed), else transformers + gguf (installed)``."""
    found = []
    for consumer in known.consumers:
        names = " + ".join(module.replace("_", "-") for module in consumer.libraries)
        if not (missing := consumer.list_missing()):
            found.append(f"{names} (installed)")
            continue
        lacking = "" if missing == consumer.libraries else f"{', '.join(missing)} "
        found.append(f"{names} ({lacking.replace('_', '-')}not installed)")
    text = ", else ".join(found)
    if known.verification_limit:
        text += f"; not {known.verification_limit}"
    return text + ("; or --verify blocks" if known.has_blocks else "")


def render_format_table(columns: dict[str, dict[str, str]] | None = None) -> str:
    """Render the formats as a Markdown table.

    Args:
        columns: further columns: heading -> name of a format -> text.
    """
    columns = columns or {}
    head = ["format", "what it preserves", "who loads it", *columns]
    rows = [
        [f"`{known.name}`", known.keeps, known.loads_with]
        + [column.get(known.name, "") for column in columns.values()]
        for known in FORMATS.values()
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * w for w in widths], *rows]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )
