"""Weights, codecs and devices for tests of the kernels of ``quant.device``.

The same tests run interpreted on a CPU and compiled on a GPU. ``TRITON_INTERPRET`` is set by
``tests/conftest.py``, before anything imports Triton.
"""

import os

import pytest
import torch
from torch import Tensor

from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.device_choice import RowLayout
from dist_peft.quant.e2m1 import E2m1Codec
from dist_peft.quant.fp8 import Fp8Codec
from dist_peft.quant.mxfp4 import Mxfp4Codec
from dist_peft.quant.nf4 import Nf4Codec
from dist_peft.quant.nvfp4 import Nvfp4Codec

__all__ = [
    "CODECS",
    "DEVICE",
    "DTYPES",
    "FLOAT_CODECS",
    "MARKS",
    "SHAPES",
    "KernelCodec",
    "describe_rows",
    "has_same_bits",
    "has_same_numbers",
    "make_weights",
    "prepare_kernels",
]

KernelCodec = Nf4Codec | AffineCodec | E2m1Codec | Fp8Codec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MARKS = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of overflows
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]
"""Of test files whose tests run on the GPU where there is one."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (3, 7), (2, 17), (3, 63), (2, 65), (1, 257), (2, 1000), (1, 2049))
CODECS: list[Nf4Codec | AffineCodec] = [
    *(Nf4Codec(size, double) for size in (8, 16, 24, 64, 256) for double in (True, False)),
    Nf4Codec(1024),
    *(AffineCodec(bits, size) for bits in (2, 3, 4, 8) for size in (8, 24, 64, 256)),
]
FLOAT_CODECS: list[E2m1Codec | Fp8Codec] = [
    Mxfp4Codec(),
    Nvfp4Codec(),
    *(Fp8Codec(size) for size in (8, 24, 128, 2**16)),
]
"""Decoded by a kernel, encoded by torch."""


def prepare_kernels() -> None:
    """Skip the test file where kernels can neither be interpreted nor run."""
    pytest.importorskip("triton", reason="triton is not installed")
    if DEVICE == "cuda":
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a GPU is there but hidden", allow_module_level=True)
    from tests.support.triton_interpreter import repair_bfloat16

    repair_bfloat16()


def make_weights(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian rows with an outlier, signed zeros, a part without negative numbers and, where they
    are long, one of subnormal scales."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    weight[0, 0] = 3.0
    weight[-1, columns // 3 : columns // 2] = torch.tensor([0.0, -0.0]).repeat(columns)[
        : columns // 2 - columns // 3
    ]
    weight[0, columns // 2 :] = weight[0, columns // 2 :].abs()
    if columns > 16:
        weight[-1, columns // 2 :] *= 1e-39
    return weight.to(DEVICE, dtype)


def describe_rows(codec: KernelCodec, columns: int) -> RowLayout:
    if isinstance(codec, Nf4Codec):
        return codec._describe_rows(codec._compute_layout(columns))
    return codec._describe_rows(columns)


def has_same_bits(one: Tensor | None, two: Tensor) -> bool:
    assert one is not None
    pair = [tensor.contiguous().view(torch.uint8) for tensor in (one, two)]
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(*pair)


def has_same_numbers(one: Tensor, two: Tensor) -> bool:
    """NaN in the same places, and the same bits in all others: devices have NaNs of their own."""
    lost = one.isnan()
    return torch.equal(lost, two.isnan()) and has_same_bits(
        one.masked_fill(lost, 0), two.masked_fill(lost, 0)
    )
