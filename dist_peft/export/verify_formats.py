"""Loading each quantized export with the library it is for, and comparing it with the run's probe.

``transformers`` loads ``bnb-nf4``, ``hf-metal``, ``compressed-tensors`` and ``gguf`` in this
process; of ``bnb-nf4`` its plain path, ``generate`` included, runs in another as a user's does.
``mlx-lm``, ``llama.cpp`` and ``gptqmodel`` run in another, too: this Python if it has them, or the
one that an environment variable names (``OTHERS``). All of them have a limit of time.
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
from dist_peft.export.time_limit import NotVerified, time_limit
from dist_peft.export.verdict import VerificationError
from dist_peft.export.verify import Comparison, Probe, compare, try_generate

__all__ = ["ADAPTER", "OTHERS", "correct_bitsandbytes", "verify_export"]

log = logging.getLogger("dist_peft")

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


def verify_export(
    name: str,
    out: Path,
    probe: Probe,
    dtype: torch.dtype,
    seconds: float = 600.0,
    *,
    trust_remote_code: bool = False,
) -> tuple[str, Comparison]:
    """Load an export with its consumer.

    Args:
        name: the format.
        out: the directory, or the file of a gguf.
        probe: of the run.
        dtype: what ``transformers`` computes in.
        seconds: longest time that the consumer may take.
        trust_remote_code: run code that lies in ``out``.

    Returns:
        The consumer with its version, and how far its logits are from the trained model's.

    Raises:
        NotVerified: the consumer is not installed, did not end in time, or computes on this
            machine something else than the files hold.
        VerificationError: the consumer refuses the export.
    """
    if name in ("mlx", "gptq"):
        consumer, logits = _elsewhere(name, out, probe.input_ids, seconds)
    elif name == "gguf" and _python("llama.cpp"):
        consumer, logits = _elsewhere("llama.cpp", out, probe.input_ids, seconds)
    elif name == "bnb-nf4":
        return _bitsandbytes(out, probe, dtype, seconds)
    else:
        with time_limit("loading it with transformers", seconds):
            consumer, logits = _here(name, out, probe.input_ids, dtype, trust_remote_code)
    return consumer, compare(logits, probe)


def _bitsandbytes(
    out: Path, probe: Probe, dtype: torch.dtype, seconds: float
) -> tuple[str, Comparison]:
    """What the files hold, and what plain ``transformers`` makes of them on this machine.

    Raises:
        NotVerified: the second fails, or is further from the trained model.
        VerificationError: the first is no number.
    """
    with time_limit("loading it with transformers", seconds):
        consumer, logits = _here("bnb-nf4", out, probe.input_ids, dtype, False)
    stored = compare(logits, probe)
    own = str(dtype).removeprefix("torch.")
    try:
        plain, logits = _elsewhere(f"bnb-nf4:{own}", out, probe.input_ids, seconds)
    except VerificationError as error:
        last = str(error).strip().splitlines()[-1]
        raise NotVerified(
            f"plain transformers with bitsandbytes cannot run {out} on this machine ({last}). The "
            f"files are right: without the kernels that fail, {stored}"
        ) from None
    found = compare(logits, probe)
    if not found.relative <= stored.relative + _PLAIN_MARGIN:
        raise NotVerified(
            f"bitsandbytes computes on this machine something else than the files hold: {found}; "
            f"without its AVX512 kernels, {stored}. Use another machine or another format"
        )
    return plain if consumer == plain else f"{plain}, plain", found


_PLAIN_MARGIN = 0.05
"""By how much of what training changed a consumer's kernels may differ from what files hold."""

_NEEDS = {
    "bnb-nf4": ("bitsandbytes", "accelerate"),
    "hf-metal": ("accelerate",),
    "compressed-tensors": ("compressed_tensors", "peft"),
    "gguf": ("gguf",),
}


@torch.no_grad()
def _here(
    name: str, out: Path, ids: Tensor, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[str, Tensor]:
    for module in _NEEDS[name]:
        if find_spec(module) is None:
            package = module.replace("_", "-")
            raise NotVerified(f"{package} is not installed; pip install {package}")
    disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
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
    if name == "bnb-nf4" and correct_bitsandbytes(model):  # before PEFT wraps its linears
        consumer += " without its AVX512 kernels"
    if name in ("compressed-tensors", "bnb-nf4") and (out / ADAPTER).is_dir():
        model.load_adapter(str(out / ADAPTER))
        consumer += f", peft {version('peft')}"
    logits = model.eval()(input_ids=ids, use_cache=False).logits.float()
    if name != "bnb-nf4":  # whose plain path runs in a process of its own
        try_generate(model, ids)
    return consumer, logits


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


def _elsewhere(consumer: str, out: Path, ids: Tensor, seconds: float) -> tuple[str, Tensor]:
    other = OTHERS.get(consumer)
    python = sys.executable if other is None else _python(consumer)
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
        done = _within(command, scratch, environment, consumer, seconds)
        if done.returncode < 0:
            raise NotVerified(
                f"the process of {consumer} was ended by signal {-done.returncode}"
                + (", as the system does where memory is short" if done.returncode == -9 else "")
            )
        if done.returncode:
            raise VerificationError(f"{consumer} cannot load {out}:\n{done.stderr}")
        return done.stdout.strip().splitlines()[-1], torch.from_numpy(np.load(file))


def _within(
    command: list[str], scratch: str, environment: dict[str, str], consumer: str, seconds: float
) -> subprocess.CompletedProcess[str]:
    """Run it with what it starts, such as compilers; all of it is ended when the time is up."""
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
        raise NotVerified(
            f"{consumer} did not load it within {seconds / 60:g} minutes (it may compile kernels "
            "when it runs first); give it more with --verify-minutes"
        ) from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)
