"""Whether 16-bit products pay on this processor.

PyTorch multiplies bfloat16 and float16 matrices on any CPU. With instructions for them (AVX512-BF16
and FP16, AMX, Arm's BF16) that is two to three times faster than float32; without, 8 (``x W^T``) to
80 times (``dy W``) slower, and computing in float32 with one rounding at the end is the better way.
Sums are accumulated in float32 either way.

The choice is made once, by a trial of both; the processor's flags would name fewer processors. The
first product of a process is often one of a dry run on fake tensors (``FakeTensorMode``), whose
time says nothing about the processor: the trial runs in a thread of its own, where no mode is
active. The environment variable ``DIST_PEFT_CPU_PRODUCTS`` (``native``, ``float32`` or ``auto``)
sets it.
"""

import functools
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from dist_peft.core.errors import UserError
from dist_peft.quant.assumed_device import get_assumed_device

__all__ = ["has_fast_product"]

_MARGIN = 1.2
"""How much faster 16-bit products must be; between processors with and without instructions for
them lies a factor of at least 16, so that noise cannot decide."""


def has_fast_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether products of ``dtype`` on ``device`` are best computed in ``dtype``.

    Always true of devices other than the CPU and of types with at least 32 bits.

    Raises:
        UserError: ``DIST_PEFT_CPU_PRODUCTS`` has another value.
    """
    device = get_assumed_device() or device
    return device.type != "cpu" or dtype.itemsize != 2 or _is_native_product_fast(dtype)


@functools.cache
def _is_native_product_fast(dtype: torch.dtype) -> bool:
    choice = os.environ.get("DIST_PEFT_CPU_PRODUCTS", "auto")
    if choice not in ("auto", "native", "float32"):
        raise UserError(
            f"DIST_PEFT_CPU_PRODUCTS={choice}: set it to native, float32 or auto, or unset it"
        )
    if choice != "auto":
        return choice == "native"
    with ThreadPoolExecutor(
        1
    ) as thread:  # modes of torch (fake tensors, devices) are a thread's own
        return thread.submit(_try_native_product, dtype).result()


@torch.no_grad()
def _try_native_product(dtype: torch.dtype) -> bool:
    x = torch.ones(64, 256, dtype=dtype, device="cpu")
    weight = torch.ones(256, 256, dtype=dtype, device="cpu")

    def multiply_natively() -> Tensor:
        return (x @ weight.T) @ weight

    def multiply_in_float32() -> Tensor:
        return ((x.float() @ weight.float().T).to(dtype).float() @ weight.float()).to(dtype)

    return _MARGIN * _time_best(multiply_natively) < _time_best(multiply_in_float32)


def _time_best(compute: Callable[[], Tensor]) -> float:
    """Return the least seconds of CPU of five runs, after a warm-up."""
    seconds = []
    for _ in range(6):
        before = time.process_time()
        compute()
        seconds.append(time.process_time() - before)
    return min(seconds[1:])
