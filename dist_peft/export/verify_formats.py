"""Load each quantized export with its target library and compare it with the run's probe.

``transformers`` loads ``bnb-nf4``, ``hf-metal``, ``compressed-tensors`` and ``gguf`` in this
process; the plain path of ``bnb-nf4``, including ``generate``, also runs in a subprocess as it
would for a user. ``mlx-lm``, ``llama.cpp`` and ``gptqmodel`` run in a subprocess of this Python if
it has them, or of the one named by an environment variable (``OTHERS``). All have a time limit.
"""

import logging
import os
import signal
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
from dist_peft.export.time_limit import VerificationSkipped, enforce_time_limit
from dist_peft.export.verdict import VerificationError
from dist_peft.export.verify import Comparison, Probe, check_generation, compare_logits

__all__ = ["ADAPTER", "OTHERS", "patch_bitsandbytes_layers", "verify_with_consumer"]

log = logging.getLogger("dist_peft")

ADAPTER = "adapter"
"""Subdirectory of an export with the adapter for the exported base."""


@dataclass(frozen=True)
class _ExternalConsumer:
    """A library that runs in a subprocess, and how to install it."""

    module: str
    variable: str
    install: str


OTHERS = {
    "mlx": _ExternalConsumer("mlx_lm", "DIST_PEFT_MLX_PYTHON", "pip install 'mlx[cpu]' mlx-lm"),
    "llama.cpp": _ExternalConsumer(
        "llama_cpp", "DIST_PEFT_LLAMACPP_PYTHON", "pip install llama-cpp-python (needs a compiler)"
    ),
    "gptq": _ExternalConsumer(
        "gptqmodel", "DIST_PEFT_GPTQ_PYTHON", "pip install gptqmodel optimum"
    ),
}
"""Consumer -> its module, the environment variable naming a Python that has it, how to install."""


def verify_with_consumer(
    name: str,
    out: Path,
    probe: Probe,
    dtype: torch.dtype,
    seconds: float = 600.0,
    *,
    trust_remote_code: bool = False,
) -> tuple[str, Comparison]:
    """Load an export with its consumer and compare its logits with the probe.

    Args:
        name: name of the format.
        out: the exported directory, or the file of a gguf.
        probe: the run's probe.
        dtype: compute type for ``transformers``.
        seconds: time limit of the consumer.
        trust_remote_code: run code that is stored in ``out``.

    Returns:
        The consumer's version and the comparison with the trained model.

    Raises:
        NotVerified: the consumer is not installed, exceeded the time limit, or does not compute
            with the stored weights on this machine.
        VerificationError: the consumer cannot load the export.
    """
    if name in ("mlx", "gptq"):
        consumer, logits = _run_in_subprocess(name, out, probe.input_ids, seconds)
    elif name == "gguf" and _find_python("llama.cpp"):
        consumer, logits = _run_in_subprocess("llama.cpp", out, probe.input_ids, seconds)
    elif name == "bnb-nf4":
        return _verify_bitsandbytes(out, probe, dtype, seconds)
    else:
        with enforce_time_limit("loading it with transformers", seconds):
            consumer, logits = _run_in_process(name, out, probe.input_ids, dtype, trust_remote_code)
    return consumer, compare_logits(logits, probe)


def _verify_bitsandbytes(
    out: Path, probe: Probe, dtype: torch.dtype, seconds: float
) -> tuple[str, Comparison]:
    """Compare the stored weights, then plain ``transformers`` on this machine, with the probe.

    Raises:
        NotVerified: plain ``transformers`` fails, or is further from the trained model than the
            stored weights are.
    """
    with enforce_time_limit("loading it with transformers", seconds):
        consumer, logits = _run_in_process("bnb-nf4", out, probe.input_ids, dtype, False)
    stored = compare_logits(logits, probe)
    own = str(dtype).removeprefix("torch.")
    try:
        plain, logits = _run_in_subprocess(f"bnb-nf4:{own}", out, probe.input_ids, seconds)
    except VerificationError as error:
        last = str(error).strip().splitlines()[-1]
        raise VerificationSkipped(
            f"plain transformers with bitsandbytes cannot run {out} on this machine ({last}). The "
            f"files are correct: without the kernels that fail, {stored}"
        ) from None
    found = compare_logits(logits, probe)
    if not found.relative <= stored.relative + _PLAIN_MARGIN:
        raise VerificationSkipped(
            f"bitsandbytes does not compute with the stored weights on this machine: {found}; "
            f"without its AVX512 kernels, {stored}. Use another machine or another format"
        )
    return plain if consumer == plain else f"{plain}, plain", found


_PLAIN_MARGIN = 0.05
"""Tolerance for a consumer's kernels against the stored weights, relative to the change by
training."""

_NEEDS = {
    "bnb-nf4": ("bitsandbytes", "accelerate"),
    "hf-metal": ("accelerate",),
    "compressed-tensors": ("compressed_tensors", "peft"),
    "gguf": ("gguf",),
}


@torch.no_grad()
def _run_in_process(
    name: str, out: Path, ids: Tensor, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[str, Tensor]:
    for module in _NEEDS[name]:
        if find_spec(module) is None:
            package = module.replace("_", "-")
            raise VerificationSkipped(f"{package} is not installed; pip install {package}")
    disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    consumer = f"transformers {version('transformers')}"
    if name in ("bnb-nf4", "hf-metal"):
        options["device_map"] = "cpu"  # the default of hf-metal is an Apple GPU
    if name == "hf-metal":
        options["dtype"] = "auto"  # linears take the type of their scales, all else must match it
    if name == "bnb-nf4":
        consumer += f", bitsandbytes {version('bitsandbytes')}"
    if name == "compressed-tensors":
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
        consumer += f", compressed-tensors {version('compressed-tensors')}"
    if name == "gguf":
        options["gguf_file"] = out.name
        out = out.parent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dequantize=True differs from the file's configuration
        model = AutoModelForCausalLM.from_pretrained(out, **options)
    if name == "bnb-nf4" and patch_bitsandbytes_layers(model):  # before PEFT wraps its linears
        consumer += " without its AVX512 kernels"
    if name in ("compressed-tensors", "bnb-nf4") and (out / ADAPTER).is_dir():
        model.load_adapter(str(out / ADAPTER))
        consumer += f", peft {version('peft')}"
    logits = model.eval()(input_ids=ids, use_cache=False).logits.float()
    if name != "bnb-nf4":  # its plain path generates in a subprocess
        check_generation(model, ids)
    return consumer, logits


def patch_bitsandbytes_layers(model: nn.Module) -> bool:
    """Make a bitsandbytes model compute with the stored weights on any CPU.

    With AVX512, bitsandbytes 0.50 dequantizes linears incorrectly if ``in_features`` is not a
    multiple of the block size (flattened to one row they are dequantized correctly): these are
    replaced by dense linears. With AVX512-BF16, its products in evaluation round activations and
    scales to bfloat16 for any model type, an error of 0.3 %: that kernel is disabled.

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


def _find_python(consumer: str) -> str | None:
    """Return a Python executable that has the library, or None."""
    other = OTHERS[consumer]
    named = os.environ.get(other.variable)
    return named or (sys.executable if find_spec(other.module) else None)


def _run_in_subprocess(consumer: str, out: Path, ids: Tensor, seconds: float) -> tuple[str, Tensor]:
    other = OTHERS.get(consumer)
    python = sys.executable if other is None else _find_python(consumer)
    if other is not None:
        log.info(
            "loading %s with %s, for at most %g minutes%s",
            out,
            other.module,
            seconds / 60,
            "; it may compile kernels first" if consumer == "gptq" else "",
        )
    if python is None:
        assert other is not None
        raise VerificationSkipped(
            f"{other.module.replace('_', '-')} is not installed; {other.install}, here or in a "
            f"separate environment, and set {other.variable} to its Python"
        )
    assert verify_consumer.__file__ is not None and ids.shape[0] == 1
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "logits.npy"
        command = [python, verify_consumer.__file__, consumer, str(out.resolve()), str(file)]
        command += [str(i) for i in ids[0].tolist()]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = _run_with_timeout(command, scratch, environment, consumer, seconds)
        if done.returncode < 0:
            raise VerificationSkipped(
                f"the process of {consumer} was killed by signal {-done.returncode}"
                + (", as the system does when out of memory" if done.returncode == -9 else "")
            )
        if done.returncode:
            raise VerificationError(f"{consumer} cannot load {out}:\n{done.stderr}")
        return done.stdout.strip().splitlines()[-1], torch.from_numpy(np.load(file))


def _run_with_timeout(
    command: list[str], scratch: str, environment: dict[str, str], consumer: str, seconds: float
) -> subprocess.CompletedProcess[str]:
    """Run a command; kill it and its children, such as compilers, when the time is up."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=scratch,
        env=environment,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise VerificationSkipped(
            f"{consumer} did not load it within {seconds / 60:g} minutes (it may compile kernels "
            "on its first run); raise the limit with --verify-minutes"
        ) from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)
