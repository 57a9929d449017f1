"""Table of the formats of ``dist-peft export`` and a writer for each.

The content depends on the run. With QA-LoRA the adapter fits into the zeros of the integer base:
formats with float zeros or biases keep codes and scales of training. With LoRA the merged rows are
re-quantized. Formats with integer zeros keep an integer base unchanged and save the adapter
separately.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from dist_peft.adapters.directory import read_adapter
from dist_peft.adapters.qalora.merge import lost_share
from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.export.adapter_copy import write_adapter_beside
from dist_peft.export.float_bias import HfMetal, Mlx
from dist_peft.export.formats.bnb_nf4 import BnbNf4
from dist_peft.export.formats.integer_zero import CompressedTensors, Gptq
from dist_peft.export.formats.kept_nf4 import KeptNf4
from dist_peft.export.merged_weights import CHUNK_BYTES, State, Walk, open_walk
from dist_peft.export.model_directory import (
    Packer,
    Written,
    check_new,
    copy_configuration,
    copy_tokenizer,
    write_directory,
)
from dist_peft.export.model_files import model_files
from dist_peft.export.stopping import add_stop_tokens
from dist_peft.model.experts import ExpertStack
from dist_peft.model.skeleton import torch_dtype
from dist_peft.quant.affine import AffineCodec

__all__ = ["FORMATS", "GGUF_TYPES", "Exported", "Format", "Job", "export_model", "format_table"]

GGUF_TYPES = ("q4_1", "q8_0", "f16")


@dataclass(frozen=True)
class Format:
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
        Format(
            "hf-bf16",
            "merged weights, rounded to bf16",
            "transformers",
            "15 %; 0.6 % with --base decoded",
        ),
        Format(
            "peft",
            "the adapter; PiSSA and LoftQ as the change since initialization",
            "PEFT",
            "none on the base as trained, except for PiSSA and LoftQ on a quantized base",
        ),
        Format("peft-expanded", "QA-LoRA as plain LoRA", "PEFT", "none: the same product"),
        Format(
            "bnb-nf4",
            "merged, re-quantized to NF4; --keep-adapter: the base's codes, separate adapter",
            "transformers with bitsandbytes (and PEFT)",
            "14 % (NF4 base); --keep-adapter 0.0 %",
        ),
        Format(
            "gptq",
            "the integer base unchanged; separate adapter",
            "transformers with gptqmodel",
            "0.02 %",
        ),
        Format(
            "compressed-tensors",
            "the integer base unchanged; separate adapter",
            "transformers with compressed-tensors",
            "0.00 %",
        ),
        Format(
            "mlx",
            "QA-LoRA: codes, scales, float32 biases. LoRA: merged, 2/3/4/8 bits",
            "mlx-lm",
            "QA-LoRA 0.00 %; LoRA 20 % (4 bits), 0.9 % (8 bits, --base decoded)",
        ),
        Format(
            "hf-metal",
            "QA-LoRA: codes, scales, float32 biases. LoRA: merged, 2/4/8 bits",
            "transformers, CPU or Apple GPU",
            "QA-LoRA 0.00 %; LoRA 20 % (4 bits)",
        ),
        Format(
            "gguf",
            "QA-LoRA: codes, scales, fp16 biases (Q4_1). LoRA: merged, Q4_1/Q8_0/F16",
            "llama.cpp, transformers",
            "QA-LoRA 0.09 % (llama.cpp 0.7 %); LoRA Q8_0 1.3 %, F16 0.08 % (--base decoded)",
        ),
    )
}


def format_table() -> str:
    """Render the formats as a Markdown table."""
    head = ["format", "what it preserves", "who loads it", "measured error"]
    rows = [[f"`{f.name}`", f.keeps, f.loads, f.error] for f in FORMATS.values()]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * w for w in widths], *rows]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


@dataclass(frozen=True)
class Job:
    """Inputs and options of one export.

    Attributes:
        base: the run's base configuration.
        directory: directory of the base's files.
        adapter_dir: directory of the run's adapter.
        out: output directory, or file of a gguf.
        pooled: the adapter is a QA-LoRA adapter and fits into the zeros of the base.
        into: rows that plain LoRA is merged into before quantization.
        bits: bits of re-quantization; default: the base's, or 4.
        group_size: group size of re-quantization; default: the base's, or 64.
        kind: type of a gguf file; default: q4_1 for QA-LoRA of up to 4 bits, else q8_0.
        merge: merge into integer zeros; requires ``lossy``.
        lossy: accept that a merge into integer zeros loses the adapter.
        keep_adapter: for bnb-nf4, keep the codes of the base and save the adapter separately.
        chunk_bytes: size of a chunk of rows in float32.
    """

    base: BaseConfig
    directory: Path
    adapter_dir: Path
    out: Path
    pooled: bool = False
    into: Literal["original", "decoded"] = "original"
    bits: int | None = None
    group_size: int | None = None
    kind: str | None = None
    merge: bool = False
    lossy: bool = False
    keep_adapter: bool = False
    chunk_bytes: int = CHUNK_BYTES

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.base.compute_dtype)

    @property
    def integer(self) -> AffineCodec | None:
        """Codec of an integer base; None for another base."""
        quant = self.base.quant
        if quant is None or quant.kind != "int":
            return None
        return AffineCodec(quant.bits, quant.group_size)

    @property
    def state(self) -> State:
        """State of the weights for formats that store the merged model."""
        return "codes" if self.pooled else self.into

    @contextmanager
    def walk(self, state: State | None = None) -> Iterator[Walk]:
        """Open the base and the adapter with ``open_walk``; ``state`` defaults to ``self.state``.

        Raises:
            UserError: an error of ``open_walk``, or the base is a mixture of experts, which was
                not tested with the consumers of these formats.
        """
        state = state or self.state
        with open_walk(
            self.base, self.directory, self.adapter_dir, state, self.chunk_bytes
        ) as walk:
            if any(isinstance(weight.linear, ExpertStack) for weight in walk.weights):
                raise UserError(
                    f"{self.directory} is a mixture of experts, which is written as hf-bf16 and as "
                    "peft only; use one of them, and quantize the result with the runtime's tools"
                )
            yield walk

    def codec(self, group_size: int) -> AffineCodec:
        """Return the codec of the output: the requested, the base's, or 4 bits in ``group_size``.

        Raises:
            UserError: the requested bits or group size differ from those of kept codes.
        """
        own = self.integer or AffineCodec(4, group_size)
        asked = (self.bits or own.bits, self.group_size or own.group_size)
        if self.pooled and asked != (own.bits, own.group_size):
            raise UserError(
                f"a QA-LoRA run keeps the codes of its base, {own.bits} bits in groups of "
                f"{own.group_size}; leave out --bits and --group-size"
            )
        if asked[1] % 8:
            raise UserError(f"--group-size {asked[1]} is not a multiple of 8")
        return AffineCodec(*asked)


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes:
        written: counts of tensors and sizes.
        path: the file or directory that the consumer loads.
        how: a short description of the conversion, for reports.
        exact: the form keeps the trained function, so that it may differ by rounding only.
    """

    written: Written
    path: Path
    how: str
    exact: bool = False


def export_model(name: str, job: Job) -> Exported:
    """Export a run in a quantized format.

    Args:
        name: name of the format.
        job: inputs and options of the export.

    Raises:
        UserError: the format cannot take the run, ``out`` is not empty, the disk is full.
    """
    return _WRITERS[name](job)


def _bnb(job: Job) -> Exported:
    quant = job.base.quant
    if job.keep_adapter:
        return _kept_nf4(job)
    packer = BnbNf4(quant.double_quant if quant else True, job.dtype)
    return _directory(job, job.state, packer, job.dtype, "merged, quantized to NF4")


def _kept_nf4(job: Job) -> Exported:
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
    packer = KeptNf4(quant.group_size, job.dtype)
    check_new(job.out)
    with job.walk("base") as walk:
        packer.check_weights(walk)
    exported = _directory(job, "base", packer, job.dtype, "base as trained; separate adapter")
    write_adapter_beside(job.adapter_dir, job.out)
    return replace(exported, exact=True)


def _float_bias(job: Job, kind: type[Mlx] | type[HfMetal]) -> Exported:
    # float32 scales require float32 elsewhere: transformers would fail on mixed types
    codec, dtype = job.codec(64), torch.float32 if job.pooled else job.dtype
    packer = kind(codec.bits, codec.group_size, dtype)
    how = _how(job, packer.bits, packer.group_size)
    return replace(_directory(job, job.state, packer, dtype, how), exact=job.pooled)


def _how(job: Job, bits: int, group_size: int) -> str:
    done = "codes kept, adapter in the biases" if job.pooled else "merged, rounded to nearest"
    return f"{done}: {bits} bits in groups of {group_size}"


def _integer(job: Job, kind: type[Gptq] | type[CompressedTensors]) -> Exported:
    if job.merge and not job.lossy:
        raise UserError(
            f"this format has integer zeros: {_loss(job)}. Leave out --merge to get base and "
            "separate adapter, which loses nothing; or add --lossy to merge nevertheless"
        )
    codec = job.codec(64)
    # codes were chosen with fp16 scales; products are exact in float32
    packer = kind(codec, torch.float32 if job.dtype == torch.float32 else torch.float16)
    if job.merge:
        how = f"merged with integer zeros: {codec.bits} bits in groups of {codec.group_size}"
        return _directory(job, job.state, packer, job.dtype, how)
    if job.integer is None:
        with job.walk("original"):
            pass  # raises first for a base that no quantized format supports
        raise UserError(
            "this format keeps an integer base (base.quant.kind: int) with a separate adapter, "
            "and this run has none. Choose bnb-nf4 or another format, or add --merge --lossy to "
            "quantize the merged model to integers"
        )
    if kind is Gptq and _is_ia3(job.adapter_dir):
        raise UserError(
            "this format keeps the adapter separate from GPTQ linears, on which PEFT does not "
            "support IA3; choose compressed-tensors or hf-bf16"
        )
    if codec != job.integer:
        raise UserError(
            f"the base is kept unchanged, {job.integer.bits} bits in groups of "
            f"{job.integer.group_size}; leave out --bits and --group-size"
        )
    how = f"base as trained, {codec.bits} bits in groups of {codec.group_size}; separate adapter"
    exported = _directory(job, "base", packer, job.dtype, how)
    write_adapter_beside(job.adapter_dir, job.out)
    return replace(exported, exact=True)


def _is_ia3(adapter_dir: Path) -> bool:
    return read_adapter(adapter_dir, values=False).config.get("peft_type") == "IA3"


def _loss(job: Job) -> str:
    """Describe the loss of a merge into integer zeros."""
    if not job.pooled or job.integer is None:
        return (
            "merged weights are re-quantized, and changes by less than half a quantization step "
            "are rounded away"
        )
    with job.walk("base") as walk:
        share = lost_share(walk.group_changes(), job.integer.bits)
    return f"rounding its merged zeros loses {share:.1%} of this run's adapter (measured)"


def _directory(job: Job, state: State, packer: Packer, dtype: torch.dtype, how: str) -> Exported:
    check_new(job.out)
    model_files(job.directory, code=job.base.trust_remote_code)  # fail before the export
    with job.walk(state) as walk:
        written = write_directory(walk, packer, job.out, dtype, compute=job.dtype)
        settings = {**walk.skeleton.settings, **packer.settings(walk, list(written.unpacked))}
    copy_configuration(job.directory, job.out, dtype, settings, code=job.base.trust_remote_code)
    copy_tokenizer(job.adapter_dir, job.out)
    add_stop_tokens(job.adapter_dir, job.out)
    return Exported(written, job.out, how)


def _gguf(job: Job) -> Exported:
    if find_spec("gguf") is None:
        raise UserError("format gguf needs the gguf package; pip install 'dist_peft[export]'")
    from dist_peft.export.formats.gguf_file import write_gguf

    codec = job.integer
    fits = job.pooled and codec is not None and codec.bits <= 4 and codec.group_size % 32 == 0
    kind = job.kind or ("q4_1" if fits else "q8_0")
    file = job.out if job.out.suffix == ".gguf" else job.out / f"model-{kind}.gguf"
    if file.exists():
        raise UserError(f"{file} exists; choose another file")
    if file.parent == job.out:
        check_new(job.out)
    with job.walk() as walk, tempfile.TemporaryDirectory() as scratch:
        copy_configuration(job.directory, Path(scratch), job.dtype, {})
        copy_tokenizer(job.adapter_dir, Path(scratch))
        written = write_gguf(walk, kind, file, Path(scratch), job.directory.name, job.dtype)
    kept = job.pooled and kind == "q4_1"
    as_trained = job.pooled or job.into == "decoded" or job.base.quant is None
    done = "codes kept, adapter in the biases" if kept else "merged"
    exact = kept or (kind == "f16" and as_trained)
    return Exported(written, file, f"{done}: {kind.upper()}", exact)


_WRITERS: dict[str, Callable[[Job], Exported]] = {
    "bnb-nf4": _bnb,
    "gptq": lambda job: _integer(job, Gptq),
    "compressed-tensors": lambda job: _integer(job, CompressedTensors),
    "mlx": lambda job: _float_bias(job, Mlx),
    "hf-metal": lambda job: _float_bias(job, HfMetal),
    "gguf": _gguf,
}
