"""Optimizers against plain use of the libraries they come from."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_peft.core.config.run import TrainConfig
from dist_peft.core.errors import UserError
from dist_peft.core.trainable_steps import TrainableSteps
from dist_peft.train.optimizers import make_optimizer_factory

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def parameters() -> list[nn.Parameter]:
    """Large enough for 8-bit moments (no multiple of 256), too small for them, without rows."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(50, 101), (7, 5), (0, 5)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def build(name: Any) -> tuple[Any, torch.optim.Optimizer, list[nn.Parameter]]:
    factory = make_optimizer_factory(TrainConfig(optimizer=name, **SETTINGS), CPU)
    learning = parameters()
    return factory, factory.build_optimizer([{"params": learning, "lr_scale": 1.0}]), learning


def steps(
    optimizer: torch.optim.Optimizer, learning: list[nn.Parameter], seeds: range = range(5)
) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for p in learning:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def assert_equal(found: list[nn.Parameter], expected: list[nn.Parameter]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def moments(factory: Any, optimizer: Any, learning: list[nn.Parameter]) -> list[dict[str, Tensor]]:
    return [{k: v.clone() for k, v in factory.read_moments(optimizer, p).items()} for p in learning]


def test_adamw_is_torchs() -> None:
    _, optimizer, learning = build("adamw")
    plain = parameters()
    steps(optimizer, learning)
    steps(torch.optim.AdamW(plain, fused=True, **SETTINGS), plain)
    assert_equal(learning, plain)


def test_adamw8bit_is_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    _, optimizer, learning = build("adamw8bit")
    plain = parameters()
    assert optimizer.state[learning[0]]["state1"].dtype == torch.uint8
    assert optimizer.state[learning[1]]["state1"].dtype == torch.float32
    steps(optimizer, learning)
    used = plain[:2]  # bitsandbytes itself cannot take an empty parameter's step
    steps(bnb.optim.AdamW8bit(used, **SETTINGS), used)
    assert_equal(learning, plain)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_moments_before_the_first_step_are_zero(name: str) -> None:
    factory, optimizer, learning = build(name)
    for p, kept in zip(learning, moments(factory, optimizer, learning), strict=True):
        assert kept.keys() == {"exp_avg", "exp_avg_sq"}
        for value in kept.values():
            assert value.shape == p.shape and value.dtype == torch.float32 and not value.any()


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_moments_go_out_and_in_bit_for_bit(name: str) -> None:
    """And a second optimizer that is given them, and the step, goes on like the first."""
    factory, optimizer, learning = build(name)
    steps(optimizer, learning)
    kept = moments(factory, optimizer, learning)
    assert kept[0]["exp_avg"].any() and kept[1]["exp_avg_sq"].any()
    other_factory, other, others = build(name)
    with torch.no_grad():
        for p, q, values in zip(learning, others, kept, strict=True):
            q.copy_(p)
            other_factory.write_moments(other, q, values)
    other_factory.set_num_steps(other, 5)
    for before, after in zip(kept, moments(other_factory, other, others), strict=True):
        assert all(torch.equal(before[key], after[key]) for key in before)
    steps(optimizer, learning, range(5, 8))
    steps(other, others, range(5, 8))
    assert_equal(others, learning)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_steps_of_a_late_group(name: str) -> None:
    factory = build(name)[0]
    early, late = (nn.Parameter(torch.zeros(8)) for _ in range(2))
    groups = [
        {"params": [early]},
        {"params": [late], "trainable_steps": TrainableSteps(((7, None),))},
    ]
    optimizer = factory.build_optimizer(groups)
    factory.set_num_steps(optimizer, 10)
    assert [int(optimizer.state[p]["step"]) for p in (early, late)] == [10, 3]


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_step_counts_for_bias_correction(name: str) -> None:
    """Zero moments and 10 steps done: the formula of step 11."""
    factory, optimizer, learning = build(name)
    factory.set_num_steps(optimizer, 10)
    steps(optimizer, learning, range(1))
    (b1, b2), gradient, start = SETTINGS["betas"], learning[1].grad, parameters()[1].detach()
    assert gradient is not None
    first = gradient * (1 - b1) / (1 - b1**11)
    second = gradient.square() * (1 - b2) / (1 - b2**11)
    expected = start * (1 - SETTINGS["lr"] * SETTINGS["weight_decay"])
    expected -= SETTINGS["lr"] * first / (second.sqrt() + SETTINGS["eps"])
    torch.testing.assert_close(learning[1].detach(), expected, rtol=1e-5, atol=1e-5)


def test_moments_of_another_optimizer_are_rounded_to_eight_bits() -> None:
    """Blocks of zeros, and of negative values only, included."""
    factory, optimizer, learning = build("adamw8bit")
    value = torch.randn(50 * 101, generator=torch.Generator().manual_seed(1))
    value[:256], value[256:512] = 0.0, -value[256:512].abs()
    value = value.view(50, 101)
    factory.write_moments(optimizer, learning[0], {"exp_avg": value, "exp_avg_sq": value.square()})
    found = factory.read_moments(optimizer, learning[0])
    for key, exact in (("exp_avg", value), ("exp_avg_sq", value.square())):
        assert not found[key].flatten()[:256].any()
        error = (found[key] - exact).abs().max()
        assert 0 < error < 0.012 * exact.abs().max()
    lowest = value.flatten()[256:512].min()
    assert found["exp_avg"].flatten()[256:512].min() == pytest.approx(float(lowest), rel=1e-6)


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw8bit"])
def test_paging_needs_cuda(name: Any) -> None:
    with pytest.raises(UserError, match=rf"train\.optimizer {name} pages .* needs a CUDA device"):
        make_optimizer_factory(TrainConfig(optimizer=name), CPU)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_paged_state_is_decoded_where_the_parameter_is(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Paged state says it is on the CPU; the meta device stands in for CUDA."""
    factory, _, _ = build("adamw8bit")
    parameter = torch.empty(20, 30, device="meta")
    devices: list[str] = []

    def decode(codes: Tensor, **scales: Any) -> Tensor:
        assert all(scales[key].device == codes.device for key in ("absmax", "code"))
        devices.append(codes.device.type)
        return torch.empty(codes.shape, device=codes.device)

    monkeypatch.setattr(factory.bnb.functional, "dequantize_blockwise", decode)
    state: dict[str, Any] = {}
    for number in "12":
        state[f"state{number}"] = torch.zeros(20, 30, dtype=dtype)
        state[f"absmax{number}"] = torch.empty(3, device="meta")
        state[f"qmap{number}"] = torch.empty(256, device="meta")
    found = factory.read_moments(SimpleNamespace(state={parameter: state}), parameter)
    assert [value.device.type for value in found.values()] == ["meta", "meta"]
    assert devices == (["meta", "meta"] if dtype == torch.uint8 else [])


def test_absent_bitsandbytes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"adamw8bit needs bitsandbytes: pip install"):
        make_optimizer_factory(TrainConfig(optimizer="adamw8bit"), CPU)
