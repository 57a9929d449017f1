"""Who decodes: the choice, the trial, the one warning."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_peft.core.errors import UserError
from dist_peft.quant import device_choice
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.assumed_device import assume_device
from dist_peft.quant.fp8 import Fp8Codec
from dist_peft.quant.mxfp4 import Mxfp4Codec
from dist_peft.quant.nf4 import Nf4Codec
from dist_peft.quant.nvfp4 import Nvfp4Codec
from tests.support.device_rows import (
    DEVICE,
    MARKS,
    KernelCodec,
    has_same_bits,
    make_weights,
    prepare_kernels,
)

CUDA = torch.device("cuda")
pytestmark = MARKS


@pytest.fixture(autouse=True)
def _fresh_verdicts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(device_choice, "_state", device_choice._DeviceState())
    monkeypatch.delenv("DIST_PEFT_KERNELS", raising=False)
    yield
    device_choice._does_triton_interpret.cache_clear()


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], found: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(device_choice, "_is_triton_installed", lambda: found)


def pretend_cuda(tensor: Tensor) -> Tensor:
    """As much of a tensor on a GPU as the choice looks at."""
    return SimpleNamespace(device=CUDA, detach=lambda: tensor)  # type: ignore[return-value]


def is_device_path(tensor: Tensor, dtype: torch.dtype = torch.bfloat16) -> bool:
    return device_choice.is_device_path(tensor, dtype)


def test_auto_takes_the_kernels_on_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(2, 4, dtype=torch.uint8)
    pretend_gpu(monkeypatch, (8, 0), found=True)
    assert is_device_path(pretend_cuda(tensor))
    assert not is_device_path(tensor)
    assert not is_device_path(pretend_cuda(tensor), torch.float64)
    with FakeTensorMode() as mode:
        assert not is_device_path(pretend_cuda(mode.from_tensor(tensor)))
    with assume_device(CUDA):
        assert not is_device_path(pretend_cuda(tensor))
    for other in ("torch", "bnb"):
        monkeypatch.setenv("DIST_PEFT_KERNELS", other)
        assert not is_device_path(pretend_cuda(tensor))


@pytest.mark.parametrize(
    ("capability", "found", "reason"),
    [
        ((9, 0), False, "triton is not installed; pip install 'dist_peft[triton]'"),
        ((7, 5), True, "the GPU has capability 7.5"),
    ],
)
def test_one_warning_where_a_gpu_takes_the_slow_path(
    capability: tuple[int, int],
    found: bool,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tensor = pretend_cuda(torch.zeros(2, 4, dtype=torch.uint8))
    pretend_gpu(monkeypatch, capability, found)
    with caplog.at_level(logging.WARNING, "dist_peft"):
        assert not any(is_device_path(tensor) for _ in range(3))
    assert [reason in record.message for record in caplog.records] == [True]
    monkeypatch.setenv("DIST_PEFT_KERNELS", "triton")
    with pytest.raises(UserError, match=reason.replace("[", r"\[").partition(";")[0]):
        is_device_path(tensor)


def test_unknown_choice_is_the_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_PEFT_KERNELS", "cuda")
    with pytest.raises(UserError, match="='cuda' is not one of auto, torch, bnb, triton"):
        Nf4Codec(64).quantize_to_packed(torch.zeros(1, 64))


@pytest.mark.parametrize("codec", [Nf4Codec(64), AffineCodec(3, 24)], ids=str)
def test_codecs_use_the_kernels(
    codec: Nf4Codec | AffineCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interpreted here, as ``triton`` insists on them."""
    prepare_kernels()
    from dist_peft.quant import device, device_encode

    weight = make_weights(3, 200)
    packed = codec.quantize_to_packed(weight)
    expected = codec.dequantize_rows(packed, 200, torch.float16)
    calls = []
    for module, name in (
        (device, "dequantize_rows"),
        (device_encode, "quantize_nf4_rows"),
        (device_encode, "quantize_affine_rows"),
    ):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, run=original, called=name: calls.append(called) or run(*a)
        )
    monkeypatch.setenv("DIST_PEFT_KERNELS", "triton")
    assert has_same_bits(codec.quantize_to_packed(weight), packed)
    assert has_same_bits(codec.dequantize_rows(packed, 200, torch.float16), expected)
    kind = "nf4" if isinstance(codec, Nf4Codec) else "affine"
    assert calls == [f"quantize_{kind}_rows", "dequantize_rows"]
    # not finite: torch refuses, and names the row
    weight[1, 199] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity in row 1"):
        codec.quantize_to_packed(weight)
    with pytest.raises(ValueError, match="floating-point matrix"):
        codec.quantize_to_packed(torch.zeros(4))
    with pytest.raises(ValueError, match="with in_features=64 are uint8"):
        codec.dequantize_rows(packed, 64, torch.float16)


@pytest.mark.parametrize("codec", [Mxfp4Codec(), Nvfp4Codec(), Fp8Codec(24)], ids=str)
def test_codecs_of_small_floats_try_their_decode_first(
    codec: KernelCodec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel runs interpreted on a CPU, as if it were a GPU with ``auto``."""
    prepare_kernels()
    from dist_peft.quant import device

    packed = codec.quantize_to_packed(make_weights(11, 77)).cpu()
    decode, calls, factor = device.dequantize_rows, [], 1.0

    def decode_counted(some: Tensor, *others: Any) -> Tensor:
        calls.append(len(some))
        return decode(some, *others) * factor

    monkeypatch.setattr(device, "dequantize_rows", decode_counted)
    expected = codec.dequantize_rows(packed, 77, torch.float32)
    assert calls == []  # a CPU is torch
    monkeypatch.setattr(device_choice, "is_device_path", lambda tensor, dtype: True)
    for _ in range(2):
        assert has_same_bits(codec.dequantize_rows(packed, 77, torch.float32), expected)
    assert calls == [8, 11, 11]
    ((kind, trusted),) = device_choice._state.verdicts.items()
    assert trusted and kind[:2] == ("decode", codec.name)
    device_choice._state.verdicts.clear()
    calls.clear()
    factor = 2.0
    with caplog.at_level(logging.WARNING, "dist_peft"):
        assert has_same_bits(codec.dequantize_rows(packed, 77, torch.float32), expected)
    assert calls == [8] and "does not give the bits of torch" in caplog.text
    with pytest.raises(ValueError, match="with in_features=512 are uint8"):
        codec.dequantize_rows(packed, 512, torch.float32)


def test_groups_too_large_for_a_program_and_hqq_are_encoded_by_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepare_kernels()
    for codec in (AffineCodec(4, 8200), AffineCodec(4, 8, "hqq")):
        weight = make_weights(1, 20)
        monkeypatch.setenv("DIST_PEFT_KERNELS", "torch")
        expected = codec.quantize_to_packed(weight)
        monkeypatch.setenv("DIST_PEFT_KERNELS", "triton")
        assert has_same_bits(codec.quantize_to_packed(weight), expected)


@pytest.mark.parametrize("fault", ["none", "other bits", "error"])
def test_a_kernelis_trusted_after_it_gave_the_bits_of_torch(
    fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows, calls = torch.arange(40).view(20, 2), []

    def by_device(some: Tensor) -> Tensor:
        calls.append(len(some))
        if fault == "error":
            raise RuntimeError("Failed to find C compiler\nsecond line")
        return some * 2 + (fault == "other bits")

    key = ("decode", fault)
    with caplog.at_level(logging.WARNING, "dist_peft"):
        for _ in range(3):
            trusted = device_choice.is_trusted(key, lambda: rows, by_device, lambda some: some * 2)
            assert trusted == (fault == "none")
    assert calls == [8]  # one trial on the first rows
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == (fault != "none")
    if fault == "error":
        assert "Failed to find C compiler)" in warnings[0]


def test_no_verdict_on_weights_that_cannot_be_encoded() -> None:
    rows = torch.ones(2, 2)
    assert not device_choice.is_trusted(("e",), lambda: rows, lambda some: None, lambda some: some)
    assert device_choice.is_trusted(("e",), lambda: rows, lambda some: some, lambda some: some)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")
@pytest.mark.parametrize(
    ("codec", "kinds"),
    [(Nf4Codec(64), 2), (Mxfp4Codec(), 1), (Nvfp4Codec(), 1), (Fp8Codec(), 1)],
    ids=str,
)
def test_auto_decodes_by_a_kernel_on_a_gpu(codec: KernelCodec, kinds: int) -> None:
    packed = codec.quantize_to_packed(make_weights(64, 4096))
    codec.dequantize_rows(packed, 4096, torch.bfloat16)
    assert set(device_choice._state.verdicts.values()) == {True}
    assert len(device_choice._state.verdicts) == kinds  # decode, and encode of NF4


def test_an_unknown_choice_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """For codecs that have one way only, too."""
    codec = AffineCodec(4, 8)
    packed = codec.quantize_to_packed(torch.ones(2, 16))
    device_choice._does_triton_interpret.cache_clear()
    monkeypatch.setenv("DIST_PEFT_KERNELS", "fast")
    with pytest.raises(UserError, match="DIST_PEFT_KERNELS='fast'"):
        codec.dequantize_rows(packed, 16, torch.float32)
