"""Comparison of a ``gguf-lora`` file with the trained model: by llama.cpp, or by the gguf reader.

llama.cpp applies an adapter to a GGUF file of the base, which the export does not write. For the
comparison a temporary one is written, in float32, of the base as training saw it (linears of the
blocks dequantized). llama.cpp runs in a process of its own through xllamacpp; its server returns
log-probabilities, so those of the probe are compared.

Without llama.cpp, and of mixtures of experts, the gguf package reads the file, and the change by
its rule, ``alpha / r * B A`` (``B A`` where alpha is 0), is added to the weights of plain
``transformers``.
"""

import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.export.formats.gguf_model import GgufModelLayout
from dist_peft.export.formats.gguf_tokenizer import add_tokenizer_metadata
from dist_peft.export.verdict import VerificationError
from dist_peft.export.verify import Comparison, Probe, compare_logits
from dist_peft.export.verify_adapter import load_trained_base
from dist_peft.export.verify_formats import ConsumerRequest, ProcessConsumer
from dist_peft.model.experts import ExpertStack
from dist_peft.model.hub import load_tokenizer
from dist_peft.model.skeleton import build_skeleton

__all__ = [
    "LLAMA_CPP_SERVER",
    "compare_by_llama_cpp",
    "read_lora_changes",
    "run_llama_cpp_server",
    "select_positions",
    "verify_gguf_lora",
    "write_base_file",
]

log = logging.getLogger("dist_peft")

_POSITIONS = 32
"""Positions of the probe that llama.cpp is asked for: its server answers with the whole vocabulary
as JSON for each."""


def run_llama_cpp_server(
    model: Path, ids: list[int], base: str, chosen: str, vocabulary: str, letter: str
) -> tuple[str, Any]:
    """Runs in the environment of xllamacpp (``export.verify_consumer``); ``model`` is an adapter of
    the file ``base``, or with an empty ``base`` a model."""
    import json
    from importlib.metadata import version

    import numpy as np
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = base or str(model)
    settings.n_ctx, settings.n_parallel, settings.warmup = max(32, len(ids) + 8), 1, False
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if base:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(model), 1.0)]
    server = xllamacpp.Server(settings)
    size = int(vocabulary)
    found = np.full((len(json.loads(chosen)), size), np.nan, np.float32)
    for row, position in enumerate(json.loads(chosen)):
        request = {"prompt": ids[: position + 1], "n_predict": 1, "n_probs": size}
        request |= {"temperature": 0.0, "post_sampling_probs": False}
        # an end token or half a character would be no answer; the probabilities are without bias
        request |= {"logit_bias": [[int(letter), 1e6]]}
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[row, token["id"]] = token["logprob"]
    return f"llama.cpp (xllamacpp {version('xllamacpp')})", found


LLAMA_CPP_SERVER = ProcessConsumer(
    "llama.cpp",
    run_llama_cpp_server,
    "xllamacpp",
    "DIST_PEFT_XLLAMACPP_PYTHON",
    "pip install xllamacpp",
)


@torch.no_grad()
def verify_gguf_lora(
    base: BaseConfig, directory: Path, request: ConsumerRequest
) -> tuple[str, Comparison]:
    """Compute with the adapter file ``request.path`` and compare with the probe.

    Args:
        base: the run's base configuration.
        directory: directory of the base's files.

    Returns:
        The program that computed, and the comparison with the trained model.

    Raises:
        VerificationSkipped: llama.cpp exceeded the time limit.
        VerificationError: the file cannot be loaded, or names a tensor that the base has not.
    """
    model = load_trained_base(base, directory, ())
    skeleton = build_skeleton(base, directory)
    layout = GgufModelLayout(skeleton)
    has_experts = any(isinstance(m, ExpertStack) for m in skeleton.model.modules())
    if LLAMA_CPP_SERVER.find_python() is not None and not has_experts:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "base.gguf"
            try:
                write_base_file(model, layout, directory, file)
                letter = load_tokenizer(directory).encode("a", add_special_tokens=False)[-1]
                return compare_by_llama_cpp(request, letter, file)
            except (UserError, OSError) as error:  # a tokenizer that it has not, or a full disk
                log.warning("not compared by llama.cpp, which has no file of the base: %s", error)
    return _compare_by_reader(model, layout, request)


def compare_by_llama_cpp(
    request: ConsumerRequest, letter: int, base: Path | None = None
) -> tuple[str, Comparison]:
    """Compute log-probabilities of some positions by llama.cpp, and compare.

    Args:
        request: ``path`` is a model's file, or an adapter's for the file ``base``.
        letter: id of a token that is answered in place of an end token.

    Raises:
        VerificationSkipped: xllamacpp is not installed, or exceeded the time limit.
        VerificationError: it cannot load the file.
    """
    probe, chosen = select_positions(request.probe)
    options = (str(base or ""), json.dumps(chosen), str(probe.trained.shape[-1]), str(letter))
    name, found = replace(LLAMA_CPP_SERVER, options=options).compute_logits(request)
    return name, compare_logits(found, probe)


def select_positions(probe: Probe) -> tuple[Probe, list[int]]:
    """Return log-probabilities of up to 32 evenly spread positions of a probe, and the positions.

    Returns:
        A probe ``[1, n, V]``, and ``n`` indices, ascending.
    """
    count = probe.input_ids.shape[1]
    spread = torch.linspace(0, count - 1, min(count, _POSITIONS)).round().long()
    trained, before = (
        logits[:1, spread].float().log_softmax(-1) for logits in (probe.trained, probe.before)
    )
    return Probe(probe.input_ids[:1, spread], trained, before), spread.tolist()


def _compare_by_reader(
    model: nn.Module, layout: GgufModelLayout, request: ConsumerRequest
) -> tuple[str, Comparison]:
    log.info(
        "llama.cpp is not here, or the base has experts: the file is read by the gguf package, "
        "and computed with in transformers; pip install xllamacpp, here or in an environment whose "
        "Python %s names, to compare by llama.cpp",
        LLAMA_CPP_SERVER.variable,
    )
    changes = read_lora_changes(request.path)
    for path, weight in model.named_parameters():
        change = changes.pop(layout.map_path(path) or "", None)
        if change is not None:
            weight.add_(layout.restore_path_rows(path, change).to(weight.dtype))
    if changes:
        raise VerificationError(
            f"{request.path} has factors for {', '.join(sorted(changes))}, and the base has no "
            "such tensor"
        )
    logits = model(input_ids=request.probe.input_ids, use_cache=False).logits.float()
    name = f"gguf {version('gguf')} (its reader), transformers {version('transformers')}"
    return name, compare_logits(logits, request.probe)


def read_lora_changes(file: Path) -> dict[str, Tensor]:
    """Return the change of each tensor of the base, ``[out, in]``, as llama.cpp computes it.

    Raises:
        VerificationError: the gguf package cannot read the file, or a factor is missing.
    """
    try:
        reader = gguf.GGUFReader(file)
        alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
        tensors = {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}
        stems = sorted({name.rpartition(".lora_")[0] for name in tensors})
        factors = {stem: (tensors[f"{stem}.lora_a"], tensors[f"{stem}.lora_b"]) for stem in stems}
    except (ValueError, LookupError, OSError) as error:
        raise VerificationError(f"the gguf package cannot read {file}: {error}") from None
    return {s: (alpha / len(A) if alpha else 1.0) * (B @ A) for s, (A, B) in factors.items()}


def write_base_file(
    model: nn.Module, layout: GgufModelLayout, tokenizer: Path, file: Path
) -> Sequence[str]:
    """Write a model of ``transformers`` as a GGUF file in float32; return the tensors' names.

    Args:
        tokenizer: directory with the tokenizer's files.

    Raises:
        UserError: a tokenizer that llama.cpp has not.
    """
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[layout.architecture])
    layout.add_model_metadata(writer, "base of the comparison", gguf.LlamaFileType.ALL_F32)
    add_tokenizer_metadata(writer, tokenizer, layout.config.vocab_size)
    names = []
    for path, weight in model.named_parameters():
        name = layout.map_path(path)
        if name is None or (layout.tied and path.startswith("lm_head.")):
            continue
        rows = layout.reorder_path_rows(path, weight.detach().float())
        rows = layout.shift_rows(path, rows)
        writer.add_tensor(name, rows.contiguous().numpy())
        names.append(name)
    if (factors := layout.compute_rope_factors()) is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return names
