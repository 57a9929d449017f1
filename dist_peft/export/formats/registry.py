"""Table of the formats of ``dist-peft export`` and a writer for each.

The content depends on the run. With QA-LoRA the adapter fits into the zeros of the integer base:
formats with float zeros or biases keep codes and scales of training. With LoRA the merged rows are
re-quantized. Formats with integer zeros keep an integer base unchanged and save the adapter
separately.
"""

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from dist_peft.adapters.adapter_format import find_format
from dist_peft.adapters.directory import read_adapter_directory
from dist_peft.adapters.low_rank.zero_points import measure_lost_share
from dist_peft.core.errors import UserError
from dist_peft.export.adapter_copy import write_adapter_copy
from dist_peft.export.float_bias import HfMetalPacker, MlxPacker
from dist_peft.export.formats.bnb_nf4 import BnbNf4Packer
from dist_peft.export.formats.export_spec import ExportResult, ExportSpec
from dist_peft.export.formats.integer_zero import CompressedTensorsPacker, GptqPacker
from dist_peft.export.formats.kept_nf4 import KeptNf4Packer
from dist_peft.export.merged_weights import State
from dist_peft.export.model_directory import (
    WeightPacker,
    copy_tokenizer_files,
    write_model_directory,
)
from dist_peft.export.stopping import add_stop_tokens
from dist_peft.model.model_files import copy_model_files, list_model_files
from dist_peft.store.fileio import remove_temporary_files
from dist_peft.store.publish import publish_directory

__all__ = [
    "FORMATS",
    "GGUF_TYPES",
    "FormatInfo",
    "export_model",
    "render_format_table",
]

GGUF_TYPES = ("q4_1", "q8_0", "f16")


@dataclass(frozen=True)
class FormatInfo:
    """A row of the table of formats.

    Attributes:
        name: name on the command line.
        keeps: the part of a run that the format preserves.
        loads: libraries that load it.
        error: error measured on the runs of docs/export.md, relative to the change by training.
    """

    name: str
    keeps: str
    loads: str
    error: str


FORMATS = {
    f.name: f
    for f in (
        FormatInfo(
            "hf-bf16",
            "merged weights, rounded to bf16",
            "transformers",
            "15 %; 0.6 % with --base decoded",
        ),
        FormatInfo(
            "peft",
            "the adapter; PiSSA and LoftQ as the change since initialization",
            "PEFT",
            "none on the base as trained, except for PiSSA and LoftQ on a quantized base",
        ),
        FormatInfo("peft-expanded", "QA-LoRA as plain LoRA", "PEFT", "none: the same product"),
        FormatInfo(
            "bnb-nf4",
            "merged, re-quantized to NF4; --keep-adapter: the base's codes, separate adapter",
            "transformers with bitsandbytes (and PEFT)",
            "14 % (NF4 base); --keep-adapter 0.0 %",
        ),
        FormatInfo(
            "gptq",
            "the integer base unchanged; separate adapter",
            "transformers with gptqmodel",
            "0.02 %",
        ),
        FormatInfo(
            "compressed-tensors",
            "the integer base unchanged; separate adapter",
            "transformers with compressed-tensors",
            "0.00 %",
        ),
        FormatInfo(
            "mlx",
            "QA-LoRA: codes, scales, float32 biases. LoRA: merged, 2/3/4/8 bits",
            "mlx-lm",
            "QA-LoRA 0.00 %; LoRA 20 % (4 bits), 0.9 % (8 bits, --base decoded)",
        ),
        FormatInfo(
            "hf-metal",
            "QA-LoRA: codes, scales, float32 biases. LoRA: merged, 2/4/8 bits",
            "transformers, CPU or Apple GPU",
            "QA-LoRA 0.00 %; LoRA 20 % (4 bits)",
        ),
        FormatInfo(
            "gguf",
            "QA-LoRA: codes, scales, fp16 biases (Q4_1). LoRA: merged, Q4_1/Q8_0/F16",
            "llama.cpp, transformers",
            "QA-LoRA 0.09 % (llama.cpp 0.7 %); LoRA Q8_0 1.3 %, F16 0.08 % (--base decoded)",
        ),
    )
}


def render_format_table() -> str:
    """Render the formats as a Markdown table."""
    head = ["format", "what it preserves", "who loads it", "measured error"]
    rows = [[f"`{f.name}`", f.keeps, f.loads, f.error] for f in FORMATS.values()]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * w for w in widths], *rows]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def export_model(name: str, job: ExportSpec) -> ExportResult:
    """Export a run in a quantized format.

    Args:
        name: name of the format.
        job: inputs and options of the export.

    Raises:
        UserError: the format cannot take the run, ``out`` is not empty, the disk is full.
    """
    return _WRITERS[name](job)


def _export_bnb(job: ExportSpec) -> ExportResult:
    quant = job.base.quant
    if job.keep_adapter:
        return _export_kept_nf4(job)
    packer = BnbNf4Packer(quant.double_quant if quant else True, job.compute_dtype)
    return _export_directory(
        job, job.merge_state, packer, job.compute_dtype, "merged, quantized to NF4"
    )


def _export_kept_nf4(job: ExportSpec) -> ExportResult:
    quant = job.base.quant
    if quant is None or quant.kind != "nf4":
        raise UserError(
            "--keep-adapter keeps the codes of an NF4 base (base.quant.kind: nf4), and this run "
            "has none; "
            + (
                "gptq and compressed-tensors keep the codes of an integer base and the adapter"
                if quant
                else "on a base that was not quantized, peft is the trained adapter"
            )
        )
    packer = KeptNf4Packer(quant.group_size, job.compute_dtype)
    job.check_output()
    with job.open_weights("base") as walk:
        packer.check_packable(walk)
    how = "base as trained; separate adapter"
    exported = _export_directory(job, "base", packer, job.compute_dtype, how, with_adapter=True)
    return replace(exported, exact=True)


def _export_float_bias(
    job: ExportSpec, kind: type[MlxPacker] | type[HfMetalPacker]
) -> ExportResult:
    # float32 scales require float32 elsewhere: transformers would fail on mixed types
    codec, dtype = job.make_target_codec(64), torch.float32 if job.pooled else job.compute_dtype
    packer = kind(codec.bits, codec.group_size, dtype)
    how = _format_quantization(job, packer.bits, packer.group_size)
    return replace(_export_directory(job, job.merge_state, packer, dtype, how), exact=job.pooled)


def _format_quantization(job: ExportSpec, bits: int, group_size: int) -> str:
    done = "codes kept, adapter in the biases" if job.pooled else "merged, rounded to nearest"
    return f"{done}: {bits} bits in groups of {group_size}"


def _export_integer(
    job: ExportSpec, kind: type[GptqPacker] | type[CompressedTensorsPacker]
) -> ExportResult:
    if job.merge and not job.lossy:
        raise UserError(
            f"this format has integer zeros: {_describe_merge_loss(job)}. Leave out --merge "
            "to get base and "
            "separate adapter, which loses nothing; or add --lossy to merge nevertheless"
        )
    codec = job.make_target_codec(64)
    # codes were chosen with fp16 scales; products are exact in float32
    packer = kind(codec, torch.float32 if job.compute_dtype == torch.float32 else torch.float16)
    if job.merge:
        how = f"merged with integer zeros: {codec.bits} bits in groups of {codec.group_size}"
        return _export_directory(job, job.merge_state, packer, job.compute_dtype, how)
    if job.integer_codec is None:
        with job.open_weights("original"):
            pass  # raises first for a base that no quantized format supports
        raise UserError(
            "this format keeps an integer base (base.quant.kind: int) with a separate adapter, "
            "and this run has none. Choose bnb-nf4 or another format, or add --merge --lossy to "
            "quantize the merged model to integers"
        )
    if kind is GptqPacker and not _is_loaded_on_gptq_linears(job.adapter_dir):
        raise UserError(
            "this format keeps the adapter separate from GPTQ linears, on which PEFT does not "
            "support this method; choose compressed-tensors or hf-bf16"
        )
    if codec != job.integer_codec:
        raise UserError(
            f"the base is kept unchanged, {job.integer_codec.bits} bits in groups of "
            f"{job.integer_codec.group_size}; leave out --bits and --group-size"
        )
    how = f"base as trained, {codec.bits} bits in groups of {codec.group_size}; separate adapter"
    exported = _export_directory(job, "base", packer, job.compute_dtype, how, with_adapter=True)
    return replace(exported, exact=True)


def _is_loaded_on_gptq_linears(adapter_dir: Path) -> bool:
    known = find_format(read_adapter_directory(adapter_dir, values=False).config)
    return known is not None and known.on_gptq_linears


def _describe_merge_loss(job: ExportSpec) -> str:
    """Describe the loss of a merge into integer zeros."""
    if not job.pooled or job.integer_codec is None:
        return (
            "merged weights are re-quantized, and changes by less than half a quantization step "
            "are rounded away"
        )
    with job.open_weights("base") as walk:
        share = measure_lost_share(walk.iterate_group_changes(), job.integer_codec.bits)
    return f"rounding its merged zeros loses {share:.1%} of this run's adapter (measured)"


def _export_directory(
    job: ExportSpec,
    state: State,
    packer: WeightPacker,
    dtype: torch.dtype,
    how: str,
    *,
    with_adapter: bool = False,
) -> ExportResult:
    job.check_output()
    list_model_files(job.directory, code=job.base.trust_remote_code)  # fail before the export
    with publish_directory(job.out) as out:
        with job.open_weights(state) as walk:
            written = write_model_directory(walk, packer, out, dtype, compute=job.compute_dtype)
            settings = {
                **walk.skeleton.settings,
                **packer.make_config(walk, list(written.unpacked)),
            }
        copy_model_files(job.directory, out, dtype, settings, code=job.base.trust_remote_code)
        copy_tokenizer_files(job.adapter_dir, out)
        add_stop_tokens(job.adapter_dir, out)
        if with_adapter:
            write_adapter_copy(job.adapter_dir, out, base=job.out)
    return ExportResult(written, job.out, how)


def _export_gguf(job: ExportSpec) -> ExportResult:
    if find_spec("gguf") is None:
        raise UserError("format gguf needs the gguf package; pip install 'dist_peft[export]'")
    from dist_peft.export.formats.gguf_file import write_gguf_file

    codec = job.integer_codec
    fits = job.pooled and codec is not None and codec.bits <= 4 and codec.group_size % 32 == 0
    kind = job.kind or ("q4_1" if fits else "q8_0")
    file = job.out if job.out.suffix == ".gguf" else job.out / f"model-{kind}.gguf"
    is_directory = file.parent == job.out
    if is_directory:
        job.check_output()
    elif file.is_dir() or (file.exists() and not job.overwrite):
        raise UserError(f"{file} exists; choose another file, or replace it with --overwrite")
    with (
        job.open_weights() as walk,
        tempfile.TemporaryDirectory() as scratch,
        publish_directory(job.out) if is_directory else nullcontext(file.parent) as out,
    ):
        remove_temporary_files(file)  # of a process that was killed
        copy_model_files(job.directory, Path(scratch), job.compute_dtype, {})
        copy_tokenizer_files(job.adapter_dir, Path(scratch))
        written = write_gguf_file(
            walk, kind, out / file.name, Path(scratch), job.directory.name, job.compute_dtype
        )
    kept = job.pooled and kind == "q4_1"
    as_trained = job.pooled or job.into == "decoded" or job.base.quant is None
    done = "codes kept, adapter in the biases" if kept else "merged"
    exact = kept or (kind == "f16" and as_trained)
    return ExportResult(written, file, f"{done}: {kind.upper()}", exact)


_WRITERS: dict[str, Callable[[ExportSpec], ExportResult]] = {
    "bnb-nf4": _export_bnb,
    "gptq": lambda job: _export_integer(job, GptqPacker),
    "compressed-tensors": lambda job: _export_integer(job, CompressedTensorsPacker),
    "mlx": lambda job: _export_float_bias(job, MlxPacker),
    "hf-metal": lambda job: _export_float_bias(job, HfMetalPacker),
    "gguf": _export_gguf,
}
