"""The choice between 16-bit products and float32 ones on a CPU."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_peft.core.errors import UserError
from dist_peft.quant import cpu_products
from dist_peft.quant.cpu_products import has_fast_product

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget_choice() -> Iterator[None]:
    cpu_products._is_native_product_fast.cache_clear()
    yield
    cpu_products._is_native_product_fast.cache_clear()


@pytest.mark.parametrize(("choice", "fast"), [("native", True), ("float32", False)])
def test_the_environment_decides(choice: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_PEFT_CPU_PRODUCTS", choice)
    assert has_fast_product(CPU, torch.bfloat16) is fast


def test_another_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_PEFT_CPU_PRODUCTS", "bf16")
    with pytest.raises(UserError, match="DIST_PEFT_CPU_PRODUCTS=bf16: set it to native"):
        has_fast_product(CPU, torch.bfloat16)


def test_wide_types_and_other_devices_need_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "_time_best", None)  # no trial
    assert has_fast_product(CPU, torch.float32) and has_fast_product(CPU, torch.float64)
    assert has_fast_product(torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize(("native", "fast"), [(0.4, True), (0.99, False), (40.0, False)])
def test_the_faster_way_is_chosen_once(
    native: float, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([native, 1.0])
    monkeypatch.setattr(cpu_products, "_time_best", lambda compute: next(seconds))
    assert [has_fast_product(CPU, torch.bfloat16) for _ in range(3)] == [fast] * 3


def test_the_trial_agrees_with_the_processor() -> None:
    if "avx512_bf16" in torch.backends.cpu.get_cpu_capability().lower():
        pytest.skip("the capability's name says nothing of AVX512-BF16")
    flags = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if flags or torch.backends.mkldnn.is_acl_available():
        assert has_fast_product(CPU, torch.bfloat16)
    else:
        assert not has_fast_product(CPU, torch.bfloat16)


@pytest.mark.parametrize("native", [0.4, 40.0])
def test_the_trial_sees_no_mode_of_its_caller(
    native: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run on fake tensors comes first in a training run; its operators take no time."""
    seconds = iter([native, 1.0])

    def time_plain_tensors(compute: Callable[[], torch.Tensor]) -> float:
        assert type(compute()) is torch.Tensor and compute().device == CPU
        return next(seconds)

    monkeypatch.setattr(cpu_products, "_time_best", time_plain_tensors)
    with FakeTensorMode(), torch.device("meta"):
        assert has_fast_product(CPU, torch.float16) is (native < 1)
    assert has_fast_product(CPU, torch.float16) is (native < 1)
