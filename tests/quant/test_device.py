"""The fused decode against torch, bit for bit: interpreted on a CPU, compiled on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.fp8 import Fp8Codec
from dist_peft.quant.mxfp4 import Mxfp4Codec
from dist_peft.quant.nf4 import Nf4Codec
from dist_peft.quant.nvfp4 import Nvfp4Codec
from tests.support.device_rows import (
    CODECS,
    DEVICE,
    DTYPES,
    FLOAT_CODECS,
    MARKS,
    SHAPES,
    KernelCodec,
    describe_rows,
    has_same_bits,
    has_same_numbers,
    make_weights,
    prepare_kernels,
)

prepare_kernels()
pytestmark = MARKS
from dist_peft.quant import device  # noqa: E402

# each codec with half of the shapes, which have another type each
CASES = [
    (codec, SHAPES[part], DTYPES[(number + part) % 3])
    for number, codec in enumerate([*CODECS, *FLOAT_CODECS])
    for part in range(number % 2, len(SHAPES), 2)
]


@pytest.mark.parametrize(("codec", "shape", "dtype"), CASES, ids=str)
def test_decodes_to_the_bits_of_torch(
    codec: KernelCodec, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    packed = codec.quantize_to_packed(make_weights(*shape))
    if isinstance(codec, AffineCodec):  # fractional zeros, as of QA-LoRA
        parts = codec.split_packed_rows(packed, shape[1])
        packed = codec.join_packed_rows(parts._replace(zero=parts.zero + 0.37), shape[1])
    found = device.dequantize_rows(packed, describe_rows(codec, shape[1]), shape[1], dtype)
    assert has_same_bits(found.cpu(), codec.dequantize_rows(packed.cpu(), shape[1], dtype))


def test_decodes_several_runs_of_scales() -> None:
    codec, columns = Nf4Codec(8), 8 * 256 * 2 + 9
    packed = codec.quantize_to_packed(make_weights(1, columns))
    layout = describe_rows(codec, columns)
    assert layout.runs == 3
    found = device.dequantize_rows(packed, layout, columns, torch.float32)
    assert has_same_bits(found, codec.dequantize_rows(packed, columns, torch.float32))


def test_decodes_every_code_with_extreme_scales() -> None:
    """All bytes as codes; scales of float16's subnormals to its overflow, and 0."""
    torch.manual_seed(0)
    for codec in (Nf4Codec(16, False), *(AffineCodec(bits, 16) for bits in (2, 3, 4, 8))):
        columns = 16 * 33
        packed = codec.quantize_to_packed(make_weights(2, columns))
        layout = describe_rows(codec, columns)
        packed[:, : layout.scales] = torch.arange(layout.scales, device=DEVICE) * 37 % 256
        scales = 10.0 ** (torch.rand(2, 33) * 13 - 8)
        scales[0, 0] = 0
        as_bytes = (scales if layout.kind == "nf4" else scales.half()).view(torch.uint8)
        packed[:, layout.scales : layout.scales + as_bytes.shape[1]] = as_bytes.to(DEVICE)
        for dtype in DTYPES:
            found = device.dequantize_rows(packed, layout, columns, dtype)
            assert has_same_bits(found, codec.dequantize_rows(packed, columns, dtype))


def make_every_byte(codec: KernelCodec, columns: int, scales: list[float]) -> Tensor:
    """All codes, and E8M0 or E4M3 scales of all bytes; a row for each float32 scale or factor."""
    packed = torch.zeros(len(scales), codec.num_row_bytes(columns), dtype=torch.uint8)
    layout = describe_rows(codec, columns)
    codes = torch.arange(layout.scales)
    packed[:, : layout.scales] = codes % 256 if layout.bits == 8 else codes % 8 * 34 + 16
    if layout.bits == 4:
        packed[:, layout.scales : layout.scales + layout.groups] = torch.arange(layout.groups)
    if layout.kind != "mxfp4":
        packed[:, -4:] = torch.tensor(scales)[:, None].view(torch.uint8)
    return packed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("codec", "columns", "lost"),
    [
        (Mxfp4Codec(), 32 * 256, [3 * 32]),
        (Nvfp4Codec(), 16 * 256, [2 * 16] * 2),
        (Fp8Codec(256), 256, [2] * 2),
    ],
    ids=str,
)
def test_decodes_every_float_with_every_scale(
    codec: KernelCodec, columns: int, lost: list[int], dtype: torch.dtype
) -> None:
    """NaN of codes and of scales, subnormals of all types, overflow of quotients and products."""
    scales = [1.0, 0.0123, 2.0**-126, 1e-40, 3e38, 2.0**126, torch.inf, 0.0, torch.nan]
    packed = make_every_byte(codec, columns, scales if len(lost) > 1 else scales[:1])
    found = device.dequantize_rows(packed.to(DEVICE), describe_rows(codec, columns), columns, dtype)
    expected = codec.dequantize_rows(packed, columns, dtype)
    assert has_same_numbers(found.cpu(), expected)
    assert expected.isnan().sum(1)[: len(lost)].tolist() == lost
    assert codec.group_size < 256 or len(set(expected[0].tolist())) == 253 + 2  # -0.0 is 0.0


@pytest.mark.parametrize("shift", [0, 1, 4])
@pytest.mark.parametrize(
    "codec",
    [
        *(Nf4Codec(64), AffineCodec(3, 64), AffineCodec(4, 40)),
        *(Mxfp4Codec(), Nvfp4Codec(), Fp8Codec(40)),
    ],
    ids=str,
)
def test_decodes_rows_within_a_wider_buffer(codec: KernelCodec, shift: int) -> None:
    packed = codec.quantize_to_packed(make_weights(3, 333))
    wide = torch.zeros(3, packed.shape[1] + 11 + shift, dtype=torch.uint8, device=DEVICE)
    view = wide[:, shift : shift + packed.shape[1]]
    view.copy_(packed)
    layout = describe_rows(codec, 333)
    found = device.dequantize_rows(view, layout, 333, torch.bfloat16)
    assert has_same_bits(found.cpu(), codec.dequantize_rows(view.cpu(), 333, torch.bfloat16))
    across = packed.T.contiguous().T  # neighbouring bytes lie far apart
    assert has_same_bits(device.dequantize_rows(across, layout, 333, torch.bfloat16), found)


def test_no_rows() -> None:
    codec = Nf4Codec(64)
    packed = codec.quantize_to_packed(make_weights(2, 128))[:0]
    found = device.dequantize_rows(packed, describe_rows(codec, 128), 128, torch.bfloat16)
    assert found.shape == (0, 128) and found.dtype == torch.bfloat16


@pytest.mark.e2e
def test_kernels_compile_for_absent_gpus(tmp_path: Path) -> None:
    """In a process of its own, which does not interpret (``tests/support/kernel_rules.py``)."""
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.kernel_rules"],
        cwd=Path(__file__).parents[2],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernels keep the rules" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")
@pytest.mark.parametrize("codec", [*CODECS, *FLOAT_CODECS], ids=str)
def test_decodes_large_weights_on_a_gpu(codec: KernelCodec) -> None:
    for rows, columns in ((1000, 4096), (65, 14336), (129, 4097), (70000, 8)):
        packed = codec.quantize_to_packed(make_weights(rows, columns))
        expected = codec.dequantize_rows(packed.cpu(), columns, torch.bfloat16)
        layout = describe_rows(codec, columns)
        found = device.dequantize_rows(packed, layout, columns, torch.bfloat16)
        assert has_same_bits(found.cpu(), expected)
