"""Both decoding paths give the same bits; who chooses which."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_peft.core.errors import UserError
from dist_peft.quant import kernels, packed_rows
from dist_peft.quant.kernels import NF4_LEVELS, choose_nf4_kernel, dequantize_affine, dequantize_nf4

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def every_byte_with_many_scales(group_size: int, padded: int) -> tuple[Tensor, Tensor]:
    """All 256 bytes; scales from fp16 subnormals to fp16 overflow, and 0."""
    rows = 40
    payload = torch.arange(rows * padded // 2).mul(37).remainder(256).to(torch.uint8)
    torch.manual_seed(0)
    absmax = 10.0 ** (torch.rand(rows, padded // group_size) * 13 - 8)
    absmax[0, 0] = 0
    return payload.view(rows, padded // 2), absmax


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("missing", [0, 5])
def test_paths_give_the_same_bits(
    dtype: torch.dtype, group_size: int, missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    payload, absmax = every_byte_with_many_scales(group_size, 2048)
    results = []
    for path in ("torch", "bnb"):
        monkeypatch.setenv("DIST_PEFT_KERNELS", path)
        assert choose_nf4_kernel(group_size, dtype, CPU) == path
        results.append(dequantize_nf4(payload, absmax, 2048 - missing, dtype))
    by_torch, by_bnb = results
    assert by_torch.shape == by_bnb.shape == (40, 2048 - missing)
    assert by_torch.is_contiguous()
    assert by_bnb.is_contiguous()
    assert torch.equal(by_torch.view(torch.uint8), by_bnb.view(torch.uint8))


@pytest.mark.parametrize("dtype", FLOATS)
def test_decode_nf4_is_level_times_absmax(dtype: torch.dtype) -> None:
    payload, absmax = every_byte_with_many_scales(24, 240)
    levels = torch.tensor(NF4_LEVELS)
    codes = torch.stack((payload >> 4, payload & 15), dim=-1).flatten(1).long()
    expected = (levels[codes].view(40, 10, 24) * absmax.unsqueeze(-1)).view(40, 240)
    assert torch.equal(dequantize_nf4(payload, absmax, 240, dtype), expected.to(dtype))


def test_payload_may_be_a_slice_of_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    payload, absmax = every_byte_with_many_scales(64, 256)
    rows = torch.cat((payload, payload.new_zeros(40, 9)), dim=1)
    expected = dequantize_nf4(payload, absmax, 256, torch.float32)
    for path in ("torch", "bnb"):
        monkeypatch.setenv("DIST_PEFT_KERNELS", path)
        assert torch.equal(dequantize_nf4(rows[:, :128], absmax, 256, torch.float32), expected)


@pytest.mark.parametrize("path", ["torch", "bnb"])
def test_no_rows(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_PEFT_KERNELS", path)
    payload = torch.zeros(0, 64, dtype=torch.uint8)
    assert dequantize_nf4(payload, torch.zeros(0, 2), 128, torch.bfloat16).shape == (0, 128)


def test_decode_affine_takes_any_float_scales() -> None:
    payload = torch.tensor([[0x10, 0x32, 0x54, 0x76]], dtype=torch.uint8)
    scale, zero = torch.tensor([[0.5]], dtype=torch.float16), torch.tensor([[1.25]])
    decoded = dequantize_affine(payload, 4, scale, zero, 7, torch.float32)
    assert decoded.tolist() == [[(code - 1.25) * 0.5 for code in range(7)]]


# -- choosing ---------------------------------------------------------------------------------


def pretend_bitsandbytes(monkeypatch: pytest.MonkeyPatch, with_cuda: bool | None) -> None:
    module = None
    if with_cuda is not None:
        module = SimpleNamespace(lib=SimpleNamespace(compiled_with_cuda=with_cuda))
    monkeypatch.setattr(kernels, "_import_bitsandbytes", lambda: module)


def test_auto_takes_bnb_on_cuda_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIST_PEFT_KERNELS", raising=False)
    pretend_bitsandbytes(monkeypatch, with_cuda=True)
    assert choose_nf4_kernel(64, torch.bfloat16, CUDA) == "bnb"
    assert choose_nf4_kernel(24, torch.bfloat16, CUDA) == "torch"
    assert choose_nf4_kernel(64, torch.float64, CUDA) == "torch"
    assert choose_nf4_kernel(64, torch.bfloat16, CPU) == "torch"
    pretend_bitsandbytes(monkeypatch, with_cuda=False)
    assert choose_nf4_kernel(64, torch.bfloat16, CUDA) == "torch"
    pretend_bitsandbytes(monkeypatch, with_cuda=None)
    assert choose_nf4_kernel(64, torch.bfloat16, CUDA) == "torch"


@pytest.mark.parametrize("installed", [True, False])
def test_auto_tries_bnb_on_a_cpu_after_many_weights(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DIST_PEFT_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "_decoded", kernels._DecodedWeights())
    monkeypatch.setattr(kernels, "TRIAL_WEIGHTS", 2 * 40 * 250)
    pretend_bitsandbytes(monkeypatch, with_cuda=False if installed else None)
    trials, used = [], []
    monkeypatch.setattr(kernels, "is_equal_and_faster", lambda *a: trials.append(a[2]) or True)
    monkeypatch.setattr(
        kernels, "_dequantize_by_bnb", lambda payload, absmax, dtype: used.append(1) or expected
    )
    kernels._is_bnb_faster.cache_clear()
    payload, absmax = every_byte_with_many_scales(64, 256)
    expected = dequantize_nf4(payload, absmax, 256, torch.float64)  # a type bitsandbytes lacks
    monkeypatch.setattr(kernels._decoded, "count", 0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        dequantize_nf4(mode.from_tensor(payload), mode.from_tensor(absmax), 250, torch.float32)
    assert kernels._decoded.count == 0
    for times in range(4):
        assert (len(used), len(trials)) == ((max(0, times - 2), times > 2) if installed else (0, 0))
        dequantize_nf4(payload, absmax, 250, torch.float32)
    assert trials == [64] * installed
    kernels._is_bnb_faster.cache_clear()


def test_forcing_the_impossible_is_the_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_PEFT_KERNELS", "bnb")
    pretend_bitsandbytes(monkeypatch, with_cuda=None)
    with pytest.raises(UserError, match="bitsandbytes is not installed; pip install"):
        choose_nf4_kernel(64, torch.float32, CPU)
    pretend_bitsandbytes(monkeypatch, with_cuda=True)
    with pytest.raises(UserError, match="cannot decode group_size 24"):
        choose_nf4_kernel(24, torch.float32, CPU)
    monkeypatch.setenv("DIST_PEFT_KERNELS", "triton")  # ``quant.device_choice`` asks first
    assert choose_nf4_kernel(64, torch.float32, CPU) == "torch"
    monkeypatch.setenv("DIST_PEFT_KERNELS", "cuda")
    with pytest.raises(UserError, match="='cuda' is not one of auto, torch, bnb, triton"):
        choose_nf4_kernel(64, torch.float32, CPU)


@pytest.mark.e2e
def test_works_without_bitsandbytes() -> None:
    program = """
import os, sys
sys.modules["bitsandbytes"] = None  # importing it now raises ImportError
import torch
from dist_peft.core.errors import UserError
from dist_peft.quant.kernels import choose_nf4_kernel
from dist_peft.quant.nf4 import Nf4Codec
codec = Nf4Codec()
weight = codec.dequantize_rows(codec.quantize_to_packed(torch.ones(2, 256)), 256, torch.float32)
assert torch.equal(weight, torch.ones(2, 256))
assert choose_nf4_kernel(64, torch.float32, torch.device("cuda")) == "torch"
os.environ["DIST_PEFT_KERNELS"] = "bnb"
try:
    codec.dequantize_rows(codec.quantize_to_packed(torch.ones(2, 256)), 256, torch.float32)
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bitsandbytes is not installed" in done.stdout


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("missing", [0, 5])
def test_a_weight_in_one_chunk_and_in_several_has_the_same_bits(
    dtype: torch.dtype, missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload, absmax = every_byte_with_many_scales(64, 256)
    scale, zero = absmax, torch.linspace(0, 15, absmax.numel()).view_as(absmax)

    def decode_both() -> list[Tensor]:
        affine = dequantize_affine(payload, 4, scale, zero, 256 - missing, dtype)
        return [dequantize_nf4(payload, absmax, 256 - missing, dtype), affine]

    whole = decode_both()
    monkeypatch.setattr(packed_rows, "CHUNK_ELEMENTS", 1000)
    for one, several in zip(whole, decode_both(), strict=True):
        assert one.is_contiguous() and one.shape == (40, 256 - missing)
        assert torch.equal(one.view(torch.uint8), several.view(torch.uint8))
