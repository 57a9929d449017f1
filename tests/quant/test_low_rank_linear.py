"""The fused linear: gradients against the composed one, launches, recomputation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout
from dist_peft.quant import low_rank_linear
from dist_peft.quant.codec import Codec, RawCodec
from dist_peft.quant.frozen_matmul import frozen_matmul
from dist_peft.quant.low_rank_linear import (
    FrozenLowRank,
    apply_frozen_low_rank,
    can_fuse_low_rank,
)
from dist_peft.quant.nf4 import Nf4Codec
from dist_peft.quant.trainable_products import apply_low_rank
from tests.support.device_rows import DEVICE, MARKS, prepare_kernels

prepare_kernels()
pytestmark = MARKS
IN, OUT, RANK, SCALING = 40, 24, 3, 1.7
NF4 = Nf4Codec(8)


class Linear(nn.Module):
    """A frozen linear and its change, fused or composed."""

    def __init__(self, columns: int, rows: int, codec: Codec, p: float, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE)

        self.codec, self.is_fused = codec, True
        self.packed = codec.quantize_to_packed(draw(rows, columns) / columns**0.5)
        self.A = nn.Parameter(draw(RANK, columns))
        self.B = nn.Parameter(draw(rows, RANK))
        self.dropout = SampleDropout(p, f"path{seed}", DropoutPosition(0))
        self.dropout.position.begin_micro_batch(5, torch.tensor([3, 8]))

    def forward(self, x: Tensor) -> Tensor:
        codec = self.codec
        if self.is_fused:
            keys = self.dropout.make_keys(x)
            own = FrozenLowRank(self.packed, codec, self.A, self.B)
            return apply_frozen_low_rank(x, [own], SCALING, keys)[0]
        change = apply_low_rank(self.dropout(x), self.A, self.B, SCALING, x.dtype)
        return frozen_matmul(x, self.packed, codec, x.shape[-1]) + change


def draw_input(dtype: torch.dtype, columns: int = IN) -> Tensor:
    x = torch.randn(2, 5, columns, generator=torch.Generator().manual_seed(7))
    return x.to(DEVICE, dtype).requires_grad_()


def compute_gradients(
    layers: nn.Module, x: Tensor, recompute: bool = False
) -> tuple[Tensor, list[Tensor | None]]:
    for parameter in layers.parameters():
        parameter.grad = None
    y = checkpoint(layers, x, use_reentrant=False) if recompute else layers(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    (y * weights.to(y)).sum().backward()
    return y, [x.grad, *(parameter.grad for parameter in layers.parameters())]


@pytest.mark.parametrize("codec", [NF4, RawCodec(torch.float32)], ids=["nf4", "raw"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_equals_the_composed_linear(codec: Codec, p: float) -> None:
    layer, results = Linear(IN, OUT, codec, p), []
    for layer.is_fused in (False, True):
        y, gradients = compute_gradients(layer, draw_input(torch.float32))
        results.append([y, *gradients])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-5)
    assert layer.A.grad is not None and layer.A.grad.dtype == torch.float32


def test_bfloat16_is_at_least_as_exact_as_the_composed_linear() -> None:
    """Distances from float64, of outputs and all gradients."""
    layer, results = Linear(IN, OUT, RawCodec(torch.bfloat16), 0.0), []
    for layer.is_fused in (False, True):
        y, gradients = compute_gradients(layer, draw_input(torch.bfloat16))
        results.append([y, *gradients])
    x = draw_input(torch.bfloat16).detach().double().requires_grad_()
    A, B = (f.detach().bfloat16().double().requires_grad_() for f in (layer.A, layer.B))
    weight = layer.codec.dequantize_rows(layer.packed, IN, torch.float32).double()
    y = x @ weight.T + SCALING * (x @ A.T) @ B.T
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    (y * weights.bfloat16().to(y)).sum().backward()
    for composed, fused, exact in zip(*results, [y, x.grad, A.grad, B.grad], strict=True):
        errors = [float((found.double() - exact).detach().norm()) for found in (composed, fused)]
        assert errors[1] <= 1.05 * errors[0]
        assert errors[1] <= 0.01 * float(exact.detach().norm())


@pytest.mark.parametrize("recompute", [False, True])
def test_a_chain_learns_through_recomputation(recompute: bool) -> None:
    chain = nn.Sequential(Linear(IN, OUT, NF4, 0.3), nn.SiLU(), Linear(OUT, IN, NF4, 0.3, seed=1))
    found = compute_gradients(chain, draw_input(torch.float32), recompute)[1]
    for layer in (chain[0], chain[2]):
        layer.is_fused = False
    expected = compute_gradients(chain, draw_input(torch.float32))[1]
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=2e-4)


def test_gradients_of_a_part_only() -> None:
    layer, x = Linear(IN, OUT, NF4, 0.0), draw_input(torch.float32)
    whole = compute_gradients(layer, x)[1]
    layer.A.requires_grad_(False)
    found = compute_gradients(layer, x.detach())[1]
    assert found[:2] == [None, None] and found[2] is not None
    assert torch.equal(found[2], whole[2])  # type: ignore[arg-type]
    layer.B.requires_grad_(False)
    own = x.detach().requires_grad_()
    found = compute_gradients(layer, own)[1]
    assert torch.equal(own.grad, whole[0]) and found[1:] == [None, None]  # type: ignore[arg-type]
    with torch.no_grad():
        assert not layer(x).requires_grad


# -- launches ---------------------------------------------------------------------------------

_FREE = (
    *("detach", "view", "_unsafe_view", "t", "transpose", "permute", "split"),
    *("empty", "empty_like", "new_empty"),
)
"""Operators that launch nothing: views and allocations."""


class CountedCalls(TorchDispatchMode):
    """Names of operators that a GPU would launch, and of stubbed kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if name not in _FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def count_calls(monkeypatch: pytest.MonkeyPatch, codec_type: type) -> Iterator[list[str]]:
    """Each kernel, and each decode, is one launch, whatever stands for it here."""
    kernels, mode = low_rank_linear._import_kernels(), CountedCalls()

    def stub(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def launch(*args: Any, **options: Any) -> Any:
            before = len(mode.names)
            result = original(*args, **options)
            mode.names[before:] = [name]
            return result

        monkeypatch.setattr(owner, name, launch)

    for name in ("project_rows", "expand_rows", "sum_outer"):
        stub(kernels, name)
    stub(codec_type, "dequantize_rows")
    with mode:
        yield mode.names


def test_launches_of_a_linear_with_recomputation_and_dropout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """14: forward twice, backward once. A block's last linear is not multiplied again."""
    linears = [Linear(IN, IN, NF4, 0.05, seed) for seed in range(3)]
    chain, x = nn.Sequential(*linears), draw_input(torch.bfloat16)
    for layer in linears:
        layer.dropout.make_keys(x)  # drawn once a micro-batch
    with count_calls(monkeypatch, Nf4Codec) as names:
        y = checkpoint(chain, x, use_reentrant=False)
        forward = len(names)
        assert names == ["project_rows", "dequantize_rows", "mm", "expand_rows"] * 3
        gradient = torch.ones_like(y)
        names.clear()
        y.backward(gradient)
    recomputed = names.index("sum_outer")
    assert names[:recomputed] == [*["project_rows", "dequantize_rows", "mm", "expand_rows"] * 2,
                                  "project_rows"]  # fmt: skip
    one = ["sum_outer", "project_rows", "sum_outer", "dequantize_rows", "mm", "expand_rows"]
    assert names[recomputed:] == one * 3
    assert forward + len(names) == 14 * 3 - 3
    assert (forward + len(names)) / 3 <= 15


@pytest.mark.parametrize("count", [2, 3])
def test_launches_of_linears_that_share_their_input(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``3n + 2`` forward and ``4n + 3`` backward, in place of ``4n`` and ``6n``, and ``n - 1`` sums
    of gradients; the same numbers up to rounding."""
    layers, found = [Linear(IN, OUT + n, NF4, 0.0, n) for n in range(count)], []
    weights = [torch.randn(2, 5, OUT + n).to(DEVICE, torch.bfloat16) for n in range(count)]
    for shared in (False, True):
        x = draw_input(torch.bfloat16)
        for layer in layers:
            layer.zero_grad()
        with count_calls(monkeypatch, Nf4Codec) as names:
            linears = [FrozenLowRank(one.packed, NF4, one.A, one.B) for one in layers]
            groups = [linears] if shared else [[linear] for linear in linears]
            y = [one for group in groups for one in apply_frozen_low_rank(x, group, SCALING)]
            forward = len(names)
            torch.autograd.backward(y, weights)
        monkeypatch.undo()
        assert forward == (3 * count + 2 if shared else 4 * count)
        backward = names[forward:]
        assert len(backward) == (4 * count + 3 if shared else 6 * count + count - 1)
        assert backward.count("sum_outer") == count + (1 if shared else count)
        gradients = [g for one in layers for g in (one.A.grad, one.B.grad)]
        found.append([*y, x.grad, *gradients])
    for apart, together in zip(*found, strict=True):
        assert together.dtype == apart.dtype
        assert (together - apart).float().norm() <= 0.01 * apart.float().norm()


# -- who uses it ------------------------------------------------------------------------------


def test_fuses_16_bit_types_on_the_device_path(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 3, dtype=torch.bfloat16, device=DEVICE)
    monkeypatch.setenv("DIST_PEFT_KERNELS", "torch")
    assert not can_fuse_low_rank(x, 8, torch.bfloat16)
    monkeypatch.setenv("DIST_PEFT_KERNELS", "triton")
    assert can_fuse_low_rank(x, 8, torch.bfloat16)
    assert not can_fuse_low_rank(x, 8, torch.float32)  # the arithmetic of the change
    assert not can_fuse_low_rank(x.float(), 8, torch.float32)
    assert not can_fuse_low_rank(x, 129, torch.bfloat16)
    assert not can_fuse_low_rank(x[:0], 8, torch.bfloat16)
    assert not can_fuse_low_rank(x.cpu(), 8, torch.bfloat16) or DEVICE == "cpu"


@pytest.mark.parametrize("is_right", [True, False])
def test_products_are_tried_once(is_right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_peft.quant import device_choice

    monkeypatch.setattr(device_choice, "_state", device_choice._DeviceState())
    monkeypatch.setenv("DIST_PEFT_KERNELS", "auto")
    kernels, calls = low_rank_linear._import_kernels(), []
    project = kernels.project_rows

    def project_rows(*args: Any) -> Tensor:
        calls.append(1)
        return project(*args) + (not is_right)

    monkeypatch.setattr(kernels, "project_rows", project_rows)
    x = torch.ones(2, 3, dtype=torch.bfloat16, device=DEVICE)
    assert [low_rank_linear._is_product_trusted(x) for _ in range(3)] == [is_right] * 3
    assert calls == [1]
