"""Loading each quantized export with the library it is for, and comparing it with the run's probe.

``transformers`` loads ``bnb-nf4``, ``hf-metal``, ``compressed-tensors`` and ``gguf`` in this
process. ``mlx-lm``, ``llama.cpp`` and ``gptqmodel`` run in another: this Python if it has them, or
the one that an environment variable names (``OTHERS``).
"""

import os
import subprocess
import sys
import tempfile
import warnings
from copy import copy
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.utils.logging import disable_progress_bar

from dist_peft.export import verify_consumer
from dist_peft.export.verify import Comparison, Probe, compare

__all__ = ["ADAPTER", "OTHERS", "NotVerified", "correct_bitsandbytes", "verify_export"]

ADAPTER = "adapter"
"""Directory inside an export that holds the adapter for the base beside it."""


@dataclass(frozen=True)
class _Other:
    """A library that is run in a process of its own."""

    module: str
    variable: str
    install: str


OTHERS = {
    "mlx": _Other("mlx_lm", "DIST_PEFT_MLX_PYTHON", "pip install 'mlx[cpu]' mlx-lm"),
    "llama.cpp": _Other(
        "llama_cpp", "DIST_PEFT_LLAMACPP_PYTHON", "pip install llama-cpp-python (needs a compiler)"
    ),
    "gptq": _Other("gptqmodel", "DIST_PEFT_GPTQ_PYTHON", "pip install gptqmodel optimum"),
}
"""Consumer -> its module, the variable that names a Python which has it, how to get it."""


class NotVerified(Exception):
    """The consumer is not installed; the message says how to get it."""


def verify_export(name: str, out: Path, probe: Probe, dtype: torch.dtype) -> tuple[str, Comparison]:
    """Load an export with its consumer.

    Args:
        name: the format.
        out: the directory, or the file of a gguf.
        probe: of the run.
        dtype: what ``transformers`` computes in.

    Returns:
        The consumer with its version, and how far its logits are from the trained model's.

    Raises:
        NotVerified: see there.
        RuntimeError: the consumer refuses the export.
    """
    if name in ("mlx", "gptq"):
        consumer, logits = _elsewhere(name, out, probe.input_ids)
    elif name == "gguf" and _python("llama.cpp"):
        consumer, logits = _elsewhere("llama.cpp", out, probe.input_ids)
    else:
        consumer, logits = _here(name, out, probe.input_ids, dtype)
    return consumer, compare(logits, probe)


_NEEDS = {
    "bnb-nf4": ("bitsandbytes", "accelerate"),
    "hf-metal": ("accelerate",),
    "compressed-tensors": ("compressed_tensors", "peft"),
    "gguf": ("gguf",),
}


@torch.no_grad()
def _here(name: str, out: Path, ids: Tensor, dtype: torch.dtype) -> tuple[str, Tensor]:
    for module in _NEEDS[name]:
        if find_spec(module) is None:
            package = module.replace("_", "-")
            raise NotVerified(f"{package} is not installed; pip install {package}")
    disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype}
    consumer = f"transformers {version('transformers')}"
    if name in ("bnb-nf4", "hf-metal"):
        options["device_map"] = "cpu"  # the default of hf-metal is an Apple GPU
    if name == "hf-metal":
        options["dtype"] = "auto"  # its linears come in the type of their scales, all else must fit
    if name == "bnb-nf4":
        consumer += f", bitsandbytes {version('bitsandbytes')}"
    if name == "compressed-tensors":
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
        consumer += f", compressed-tensors {version('compressed-tensors')}"
    if name == "gguf":
        options["gguf_file"] = out.name
        out = out.parent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that our dequantize=True is not the file's
        model = AutoModelForCausalLM.from_pretrained(out, **options)
    if name == "compressed-tensors" and (out / ADAPTER).is_dir():
        model.load_adapter(str(out / ADAPTER))
        consumer += f", peft {version('peft')}"
    if name == "bnb-nf4" and correct_bitsandbytes(model):
        consumer += " without its AVX512 kernels"
    return consumer, model.eval()(input_ids=ids, use_cache=False).logits.float()


def correct_bitsandbytes(model: nn.Module) -> bool:
    """Let a bitsandbytes model compute with the weights that its files hold, on any CPU.

    With AVX512 bitsandbytes 0.50 decodes linears wrongly whose ``in_features`` are no whole number
    of blocks of 64 (as one long row it decodes them rightly): those are made dense. With
    AVX512-BF16 its products in evaluation round activations and scales to bfloat16 whatever the
    model's type, 0.3 % of a product: that kernel is left out.

    Returns:
        Whether anything was changed.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    changed = False
    for name, module in list(model.named_modules()):
        if not isinstance(module, Linear4bit):
            continue
        changed |= bool(getattr(module, "support_avx512bf16_for_cpu", False))
        module.support_avx512bf16_for_cpu = False
        packed: Any = module.weight
        state = packed.quant_state
        if module.in_features % state.blocksize == 0:
            continue
        in_one_row = copy(state)
        in_one_row.shape = torch.Size([state.shape.numel()])
        weight = dequantize_4bit(packed.data, in_one_row).reshape(state.shape)
        if not torch.equal(weight, dequantize_4bit(packed.data, state)):
            dense = nn.Linear(module.in_features, module.out_features, device="meta")
            dense.weight, dense.bias = nn.Parameter(weight), module.bias
            model.set_submodule(name, dense)
            changed = True
    return changed


def _python(consumer: str) -> str | None:
    """A Python that has the library; None: there is none."""
    other = OTHERS[consumer]
    named = os.environ.get(other.variable)
    return named or (sys.executable if find_spec(other.module) else None)


def _elsewhere(consumer: str, out: Path, ids: Tensor) -> tuple[str, Tensor]:
    other, python = OTHERS[consumer], _python(consumer)
    if python is None:
        raise NotVerified(
            f"{other.module.replace('_', '-')} is not installed; {other.install}, here or in an "
            f"environment of its own whose Python {other.variable} names"
        )
    assert verify_consumer.__file__ is not None and ids.shape[0] == 1
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "logits.npy"
        command = [python, verify_consumer.__file__, consumer, str(out.resolve()), str(file)]
        command += [str(i) for i in ids[0].tolist()]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=scratch, env=environment
        )
        if done.returncode:
            raise RuntimeError(f"{consumer} cannot load {out}:\n{done.stderr}")
        return done.stdout.strip().splitlines()[-1], torch.from_numpy(np.load(file))
