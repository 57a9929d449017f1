"""``gguf``: the format's class; ``formats.gguf_file`` writes it with the optional package gguf."""

import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dist_peft.core.errors import UserError
from dist_peft.export.formats.expert_layout import ExpertLayout
from dist_peft.export.formats.export_format import (
    ACT_ORDER,
    ExportOption,
    PackedExport,
    PlannedExport,
)
from dist_peft.export.formats.export_spec import ExportResult, ExportSpec
from dist_peft.export.model_directory import copy_tokenizer_files
from dist_peft.export.verify import Comparison, compare_logits
from dist_peft.export.verify_formats import (
    Consumer,
    ConsumerRequest,
    ProcessConsumer,
    TransformersConsumer,
)
from dist_peft.model.hub import load_tokenizer
from dist_peft.model.model_files import copy_model_files
from dist_peft.quant.codec import make_codec
from dist_peft.store.fileio import remove_temporary_files
from dist_peft.store.publish import publish_directory

__all__ = ["LLAMA_CPP", "GgufExport", "find_layout_obstacle"]

TYPE = ExportOption(
    "type",
    "default: q4_1 or mxfp4 where it keeps the codes of training, else q8_0; mxfp4: experts, and "
    "q8_0 for the rest",
    {"choices": ("q4_1", "q8_0", "f16", "mxfp4")},
)


def run_llama_cpp(model: Path, ids: list[int]) -> tuple[str, Any]:
    """Runs in the environment of llama-cpp-python (``export.verify_consumer``)."""
    from importlib.metadata import version

    from llama_cpp import Llama

    context = max(len(ids), 32)
    loaded = Llama(str(model), n_ctx=context, n_batch=context, logits_all=True, verbose=False)
    loaded.eval(ids)
    return f"llama.cpp (llama-cpp-python {version('llama-cpp-python')})", loaded.scores[: len(ids)]


LLAMA_CPP = ProcessConsumer(
    "llama.cpp",
    run_llama_cpp,
    "llama_cpp",
    "DIST_PEFT_LLAMACPP_PYTHON",
    "pip install llama-cpp-python (needs a compiler)",
)


def find_layout_obstacle(run: PlannedExport) -> str | None:
    """Return the reason for which GGUF has no layout of the run's model; None: it has, or the gguf
    package is not there to tell."""
    if find_spec("gguf") is None:
        return None
    from dist_peft.export.formats.gguf_model import GgufModelLayout  # needs an optional package

    try:
        GgufModelLayout(run.skeleton)
    except UserError as error:
        return str(error)
    return None


_READ_BY_TRANSFORMERS = ("llama", "qwen2", "qwen3", "phi3")
"""Architectures whose files ``transformers`` 5.23 loads as the model that they were written of. Of
the others it has no Gemma 1, takes keys of Gemma 2 and 3 from its own defaults, and reads Mixtral's
experts as a dense Llama and Qwen's in other shapes."""


def _is_read_by_transformers(file: Path) -> bool:
    import gguf

    reader = gguf.GGUFReader(file)
    experts = any("_exps." in tensor.name for tensor in reader.tensors)
    name = reader.fields["general.architecture"].contents()
    if name == "qwen3" and reader.fields["qwen3.attention.key_length"].contents() != 128:
        return False  # transformers takes 128 from its defaults
    return name in _READ_BY_TRANSFORMERS and not experts


def _find_kept_type(job: ExportSpec) -> str | None:
    """Return the type whose blocks hold the run's codes as they are; None: none does."""
    codec, quant = job.integer_codec, job.base.quant
    if job.trained_codes and make_codec(quant, job.compute_dtype).mxfp4_rows is not None:
        return "mxfp4"
    if job.codes_state is None or codec is None or codec.group_size % 32:
        return None
    if codec.bits <= 4:
        return "q4_1"
    # Q8_0 has signed codes and no zeros
    symmetric = quant is not None and quant.solver == "absmax"
    return "q8_0" if job.trained_codes and symmetric else None


class GgufExport(PackedExport):
    """A file of llama.cpp, in Q4_1, Q8_0, MXFP4 or F16."""

    name = "gguf"
    keeps = "QA-LoRA: codes, scales, fp16 biases (Q4_1). MXFP4 of experts. LoRA: merged"
    loads_with = "llama.cpp, transformers"
    classifier_limit = "GGUF has names for the heads of a few rerankers only"
    options = (TYPE,)
    experts = ExpertLayout(stacked=True)
    consumer = TransformersConsumer(needs=("gguf",), file_argument="gguf_file")
    """Where llama.cpp is not installed, of models that ``transformers`` reads."""

    def find_packing_obstacle(self, run: PlannedExport, options: Mapping[str, Any]) -> str | None:
        return find_layout_obstacle(run)

    def write_export(self, job: ExportSpec) -> ExportResult:
        if find_spec("gguf") is None:
            raise UserError("format gguf needs the gguf package; pip install 'dist_peft[export]'")
        from dist_peft.export.formats.gguf_file import write_gguf_file

        kept_type = _find_kept_type(job)
        default = kept_type if kept_type in ("q4_1", "mxfp4") else "q8_0"
        kind = job.options.get(TYPE.key) or default
        state = "trained" if kept_type == "mxfp4" else job.codes_state
        kept = state is not None and kind in ("q4_1", kept_type)
        file = job.out if job.out.suffix == ".gguf" else job.out / f"model-{kind}.gguf"
        is_directory = file.parent == job.out
        if is_directory:
            job.check_output()
        elif file.is_dir() or (file.exists() and not job.overwrite):
            raise UserError(f"{file} exists; choose another file, or replace it with --overwrite")
        with (
            job.open_weights(state if kept else None) as walk,
            tempfile.TemporaryDirectory() as scratch,
            publish_directory(job.out) if is_directory else nullcontext(file.parent) as out,
        ):
            if any(map(walk.find_column_order, walk.weights)):
                raise UserError(f"{job.directory} is not written as gguf: {ACT_ORDER}")
            remove_temporary_files(file)  # of a process that was killed
            copy_model_files(job.directory, Path(scratch), job.compute_dtype, {})
            copy_tokenizer_files(job.adapter_dir, Path(scratch))
            written = write_gguf_file(
                walk, kind, out / file.name, Path(scratch), job.directory.name, job.compute_dtype
            )
        as_trained = job.pooled or job.into == "decoded" or job.base.quant is None
        done = "merged"
        if kept:
            done = "codes kept, adapter in the biases" if job.pooled else "the trained codes"
        exact = kept or (kind == "f16" and as_trained)
        return ExportResult(written, file, f"{done}: {kind.upper()}", exact)

    @property
    def consumers(self) -> tuple[Consumer, ...]:
        return (LLAMA_CPP, self.consumer)

    verification_limit = "models that transformers does not read; xllamacpp compares these"

    def verify_export(self, job: ExportSpec, request: ConsumerRequest) -> tuple[str, Comparison]:
        from dist_peft.export.formats.gguf_lora_check import LLAMA_CPP_SERVER, compare_by_llama_cpp

        by_server = LLAMA_CPP_SERVER.find_python() or not _is_read_by_transformers(request.path)
        if not LLAMA_CPP.find_python() and by_server:
            letter = load_tokenizer(job.directory).encode("a", add_special_tokens=False)[-1]
            return compare_by_llama_cpp(request, letter)
        consumer: Consumer = LLAMA_CPP if LLAMA_CPP.find_python() else self.consumer
        name, logits = consumer.compute_logits(request)
        return name, compare_logits(logits, request.probe)
