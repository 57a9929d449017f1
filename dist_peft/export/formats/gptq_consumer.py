"""Load exports with gptqmodel, which reads GPTQ and AWQ: through ``transformers``, or by itself.

``transformers`` 5.24 with gptqmodel 7.7 builds a mixture's experts as stacks, finds no tensor for
them in such a directory and leaves them uninitialized, without an error. gptqmodel's own loader
makes each expert three linears first (``mlp.experts.3.gate_proj``) and reads them. It computes in
16 bits. It makes linears of Granite's too, and reads none of them: these stay
dense, as ``transformers`` reads them.
"""

from pathlib import Path
from typing import Any

from dist_peft.export.formats.expert_layout import ExpertLayout
from dist_peft.export.verify import Comparison, compare_logits
from dist_peft.export.verify_consumer import run_plain_transformers
from dist_peft.export.verify_formats import ConsumerRequest, ProcessConsumer
from dist_peft.store.index import SafetensorsIndex

__all__ = ["GPTQ_EXPERTS", "GPTQ_TRANSFORMERS", "run_gptqmodel", "verify_with_gptqmodel"]


def run_gptqmodel(model: Path, ids: list[int]) -> tuple[str, Any]:
    """Runs in the environment of gptqmodel (``export.verify_consumer``)."""
    import contextlib
    import sys
    from importlib.metadata import version

    import torch
    from gptqmodel import BACKEND, GPTQModel

    with contextlib.redirect_stdout(sys.stderr):  # it prints while it loads
        loaded = GPTQModel.load(
            str(model), device="cpu", backend=BACKEND.AUTO, dtype=torch.bfloat16
        )
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits
    return f"gptqmodel {version('gptqmodel')}, its own loader, bfloat16", logits[0].float().numpy()


_INSTALLED = (
    "gptqmodel",
    "DIST_PEFT_GPTQ_PYTHON",
    "pip install gptqmodel optimum",
    "; it may compile kernels first",
)
GPTQ_TRANSFORMERS = ProcessConsumer(
    "gptq", run_plain_transformers, *_INSTALLED, options=("float32", "gptqmodel")
)
"""For everything but mixtures."""

_OWN_LOADER = ProcessConsumer("gptqmodel", run_gptqmodel, *_INSTALLED)

GPTQ_EXPERTS = ExpertLayout(
    by_modules=True,
    linear_types=frozenset({"llama4_text", "qwen3_vl_moe_text"}),
    dense_stacks=True,
    separate_limit="gptqmodel's loader of experts takes no adapter of PEFT for them, and "
    "transformers leaves such experts uninitialized; add --merge --lossy",
)


def verify_with_gptqmodel(request: ConsumerRequest) -> tuple[str, Comparison]:
    """Load an export with the loader that reads it, and compare.

    Returns:
        The version of the library and the comparison.

    Raises:
        VerificationSkipped: gptqmodel is not installed, or exceeded the time limit.
        VerificationError: it cannot load the export.
    """
    known = GPTQ_TRANSFORMERS
    if known.find_python() is not None and _holds_experts(request.path):
        known = _OWN_LOADER
    consumer, logits = known.compute_logits(request)
    return consumer, compare_logits(logits, request.probe)


def _holds_experts(directory: Path) -> bool:
    names = SafetensorsIndex.open(directory).tensors
    return any(".experts." in name and name.endswith(".qweight") for name in names)
