import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_peft.adapters.lora.layer import LoraLinear, LoraSpec
from dist_peft.core.span import Span, row_span
from dist_peft.model.adapter_module import AdapterModule, InitializesFromBase
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout
from dist_peft.quant.codec import Codec
from tests.support.adapters import RAW, freeze, int_codec
from tests.support.device_rows import prepare_kernels
from tests.support.thread_ranks import run_ranks

OUT, IN, R, S = 20, 32, 3, 1.7
PATH = "model.layers.0.q_proj"


def dense(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias=bias)


def spec(**settings: Any) -> LoraSpec:
    return LoraSpec(**{"r": R, "scaling": S, "arithmetic": torch.float32, "seed": 1, **settings})


def build(codec: Codec = RAW, bias: bool = True, p: float = 0.0, **settings: Any) -> LoraLinear:
    """A filled layer whose parameters have moved from their start."""
    base = freeze(dense(bias), codec)
    dropout = SampleDropout(p, PATH, DropoutPosition(0))
    dropout.position.begin_micro_batch(5, torch.tensor([3, 8]))
    layer = LoraLinear(base, PATH, spec(**settings), dropout)
    fill(layer, dense(bias).weight.detach())
    generator = torch.Generator().manual_seed(2)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return layer


def fill(layer: LoraLinear, weight: Tensor) -> None:
    rows = layer.prepare_base_rows(weight, Span(0, OUT), lambda t: t)
    layer.base.packed.data = layer.base.codec.quantize_to_packed(rows)
    for name, shape in layer.shapes.items():
        value = layer.init_rows(name, Span(0, shape[0]))
        trains = getattr(layer, name).requires_grad
        setattr(layer, name, nn.Parameter(value, requires_grad=trains))


def inputs() -> Tensor:
    return torch.randn(2, 6, IN, generator=torch.Generator().manual_seed(4)).requires_grad_()


def reference(layer: LoraLinear, x: Tensor, A: Tensor, B: Tensor, m: Tensor | None) -> Tensor:
    """The formulas of the papers, with the weight decoded."""
    weight = layer.base.dequantize_weight(torch.float32)
    dropped = layer.dropout(x)
    if m is None:
        return F.linear(x, weight, layer.base.bias) + S * dropped @ A.T @ B.T
    changed = weight + S * B @ A
    factor = m / changed.norm(dim=1).detach()
    y = F.linear(x, weight, layer.base.bias) - F.linear(dropped, weight)
    return y + F.linear(dropped, factor[:, None] * changed)


@pytest.mark.parametrize("codec", [RAW, int_codec(4), int_codec(2)], ids=["raw", "int4", "int2"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("dora", [False, True])
def test_equals_the_dense_formula(codec: Codec, bias: bool, p: float, dora: bool) -> None:
    layer = build(codec, bias, p, dora=dora)
    x = inputs()
    y = layer(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(6))
    (y * weights).sum().backward()

    names = ["lora_A", "lora_B", *(["magnitude"] if dora else [])]
    own = [getattr(layer, name).detach().clone().requires_grad_() for name in names]
    other = inputs()
    expected = reference(layer, other, own[0], own[1], own[2] if dora else None)
    (expected * weights).sum().backward()

    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-5, atol=1e-5)
    for name, value in zip(names, own, strict=True):
        torch.testing.assert_close(getattr(layer, name).grad, value.grad, rtol=1e-4, atol=1e-4)
    assert all(p.grad is None for p in layer.base.parameters())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_fused_linear_of_a_gpu(bias: bool, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted; outputs and gradients are those of the composed layer up to rounding."""
    prepare_kernels()
    layer, results = build(int_codec(4), bias, p, arithmetic=torch.bfloat16), []
    for kernels in ("torch", "triton"):
        monkeypatch.setenv("DIST_PEFT_KERNELS", kernels)
        x = inputs().detach().bfloat16().requires_grad_()
        layer.zero_grad()
        y = layer(x)
        y.float().square().sum().backward()
        results.append([y, x.grad, layer.lora_A.grad, layer.lora_B.grad])
    assert "FrozenLowRank" in str(y.grad_fn) or bias
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert (found - expected).norm() <= 0.01 * expected.norm()
    layer.eval()
    assert not torch.equal(layer(x), y) or p == 0


def test_hooks_of_the_base_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine gathers a head's rows there, and frees them after the product."""
    prepare_kernels()
    monkeypatch.setenv("DIST_PEFT_KERNELS", "triton")
    layer, calls = build(RAW, arithmetic=torch.bfloat16), []
    y = layer(inputs().bfloat16())
    packed = layer.base.packed.data
    layer.base.packed.data = torch.zeros_like(packed)

    def gather(module: nn.Module, args: Any) -> None:
        calls.append("before")
        layer.base.packed.data = packed

    def release(module: nn.Module, args: Any, output: Tensor) -> None:
        calls.append("after")
        layer.base.packed.data = torch.zeros_like(packed)

    layer.base.register_forward_pre_hook(gather)
    layer.base.register_forward_hook(release)
    assert torch.equal(layer(inputs().bfloat16()), y)
    assert calls == ["before", "after"]


def test_dropout_is_off_in_evaluation() -> None:
    layer = build(p=0.4).eval()
    x = inputs()
    torch.testing.assert_close(layer(x), reference(layer, x, layer.lora_A, layer.lora_B, None))


@pytest.mark.parametrize("codec", [RAW, int_codec(4)], ids=["raw", "int4"])
@pytest.mark.parametrize("dora", [False, True])
def test_starts_as_the_base(codec: Codec, dora: bool) -> None:
    layer = LoraLinear(
        freeze(dense(), codec), PATH, spec(dora=dora), SampleDropout(0.0, PATH, DropoutPosition(0))
    )
    fill(layer, dense().weight.detach())
    assert torch.equal(layer(inputs()), layer.base(inputs()))


def test_dora_norm_without_the_weight() -> None:
    layer = build(int_codec(4), dora=True)
    changed = layer.base.dequantize_weight(torch.float32) + S * layer.lora_B @ layer.lora_A
    image = layer.lora_A @ layer.base.dequantize_weight(torch.float32).T
    norm = layer._compute_weight_norm(image)
    torch.testing.assert_close(norm, changed.norm(dim=1), rtol=1e-6, atol=0)


def test_dora_survives_a_zero_row() -> None:
    layer = LoraLinear(
        freeze(dense()), PATH, spec(dora=True), SampleDropout(0.0, PATH, DropoutPosition(0))
    )
    weight = dense().weight.detach().clone()
    weight[4] = 0
    fill(layer, weight)
    y = layer(inputs())
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(layer.magnitude.grad).all()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("arithmetic", [torch.float32, torch.bfloat16])
def test_types(dora: bool, arithmetic: torch.dtype) -> None:
    layer = build(int_codec(4), dora=dora, arithmetic=arithmetic, p=0.1)
    x = inputs().detach().bfloat16().requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    for name in ("lora_A", "lora_B"):
        parameter = getattr(layer, name)
        assert parameter.dtype == parameter.grad.dtype == torch.float32
    expected = reference(
        layer, x.float(), layer.lora_A, layer.lora_B, layer.magnitude if dora else None
    )
    assert (y - expected).norm() < 0.02 * expected.norm()


# -- start -----------------------------------------------------------------------------------------


def test_default_start_is_pefts() -> None:
    layer = LoraLinear(
        freeze(dense()), PATH, spec(r=16), SampleDropout(0, PATH, DropoutPosition(0))
    )
    A = layer.init_rows("lora_A", Span(0, 16))
    assert A.abs().max() <= 1 / math.sqrt(IN)
    assert A.abs().max() > 0.95 / math.sqrt(IN)
    assert A.var().item() == pytest.approx(1 / (3 * IN), rel=0.1)
    assert torch.equal(layer.init_rows("lora_B", Span(3, 7)), torch.zeros(4, 16))


def test_default_start_depends_on_seed_and_path_only() -> None:
    def start(path: str, seed: int, parts: int) -> Tensor:
        layer = LoraLinear(
            freeze(dense()), path, spec(seed=seed), SampleDropout(0, path, DropoutPosition(0))
        )
        return torch.cat([layer.init_rows("lora_A", row_span(R, parts, i)) for i in range(parts)])

    one = start(PATH, 1, 1)
    for parts in (2, 3, 5):
        assert torch.equal(start(PATH, 1, parts), one)
    torch.manual_seed(99)
    assert torch.equal(start(PATH, 1, 1), one)
    assert not torch.equal(start(PATH, 2, 1), one)
    assert not torch.equal(start(PATH + "x", 1, 1), one)


def test_parameters_and_protocols() -> None:
    layer = LoraLinear(
        freeze(dense()),
        PATH,
        spec(dora=True, init="loftq"),
        SampleDropout(0, PATH, DropoutPosition(0)),
    )
    assert isinstance(layer, AdapterModule)
    assert isinstance(layer, InitializesFromBase)
    own = dict(layer.named_parameters(recurse=False))
    assert set(own) == set(layer.shapes)
    assert {name for name, p in own.items() if p.requires_grad} == {"lora_A", "lora_B", "magnitude"}
    assert all(p.is_meta and p.dtype == torch.float32 for p in own.values())
    assert all(tuple(p.shape) == layer.shapes[name] for name, p in own.items())
    assert "base.packed" in dict(layer.named_parameters())


@pytest.mark.parametrize("start", ["pissa", "loftq"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("ranks", [2, 3])
def test_sharded_start(start: str, dora: bool, ranks: int) -> None:
    weight = dense().weight.detach()
    template = LoraLinear(
        freeze(dense(), int_codec(4)),
        PATH,
        spec(init=start, dora=dora, iterations=3),
        SampleDropout(0, PATH, DropoutPosition(0)),
    )

    def load(rank: int, reduce: Any, ranks: int = ranks) -> dict[str, Tensor]:
        layer = copy.deepcopy(template)
        span = row_span(OUT, ranks, rank)
        found = {"encoded": layer.prepare_base_rows(weight[span.slice], span, reduce)}
        for name, shape in layer.shapes.items():
            found[name] = layer.init_rows(name, row_span(shape[0], ranks, rank))
            assert found[name].is_contiguous()  # FSDP2 flattens shards by a view
        return found

    parts = run_ranks(ranks, load)
    alone = load(0, lambda t: t, ranks=1)
    for name, value in alone.items():
        joined = torch.cat([part[name] for part in parts])
        torch.testing.assert_close(joined, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("start", "iterations"), [("pissa", 4), ("loftq", 1), ("loftq", 4)])
def test_start_and_base_give_the_weight(start: str, iterations: int) -> None:
    weight = dense().weight.detach()
    layer = LoraLinear(
        freeze(dense(), int_codec(4)),
        PATH,
        spec(init=start, iterations=iterations),
        SampleDropout(0, PATH, DropoutPosition(0)),
    )
    fill(layer, weight)
    names = {"start_A", "start_B", "removed_A", "removed_B"} & set(layer.shapes)
    assert set(layer.start_names) == names
    assert ("removed_A" in names) == (start == "loftq" and iterations > 1)
    assert torch.equal(layer.lora_A, layer.start_A)
    assert torch.equal(layer.lora_B, layer.start_B)
    assert layer.lora_B.data_ptr() != layer.start_B.data_ptr()
    effective = layer.base.dequantize_weight(torch.float32) + S * layer.lora_B @ layer.lora_A
    codec = layer.base.codec
    plain = codec.dequantize_rows(codec.quantize_to_packed(weight), IN, torch.float32)
    assert (weight - effective).norm() < 0.95 * (weight - plain).norm()


@pytest.mark.parametrize(("start", "iterations"), [("pissa", 4), ("loftq", 1), ("loftq", 3)])
def test_resuming_does_not_search_again(start: str, iterations: int) -> None:
    weight = dense().weight.detach()

    def fresh() -> LoraLinear:
        settings = spec(init=start, iterations=iterations, dora=True)
        dropout = SampleDropout(0, PATH, DropoutPosition(0))
        return LoraLinear(freeze(dense(), int_codec(4)), PATH, settings, dropout)

    def fail(tensor: Tensor) -> Tensor:
        raise AssertionError("searched again")

    first, second = fresh(), fresh()
    fill(first, weight)
    second.load_initial_values({name: getattr(first, name).detach() for name in first.start_names})
    for span in (Span(0, 7), Span(7, OUT)):
        again = copy.deepcopy(second)
        packed = again.base.codec.quantize_to_packed(
            again.prepare_base_rows(weight[span.slice], span, fail)
        )
        assert torch.equal(packed, first.base.packed[span.slice])
        for name in ("start_B", "base_norm2"):
            assert torch.equal(again.init_rows(name, span), getattr(first, name)[span.slice])
        assert torch.equal(again.init_rows("start_A", Span(0, R)), first.start_A)


def test_asking_before_preparing() -> None:
    for settings, name in [({"init": "pissa"}, "lora_A"), ({"dora": True}, "base_norm2")]:
        layer = LoraLinear(
            freeze(dense()), PATH, spec(**settings), SampleDropout(0, PATH, DropoutPosition(0))
        )
        with pytest.raises(
            RuntimeError, match=f"{PATH}.{name} has no initial values before prepare_base_rows"
        ):
            layer.init_rows(name, Span(0, 1))


def test_no_rows_at_all() -> None:
    """A rank beyond the last row still takes part in every sum."""
    layer = LoraLinear(
        freeze(dense(), int_codec(4)),
        PATH,
        spec(init="loftq", dora=True),
        SampleDropout(0, PATH, DropoutPosition(0)),
    )
    sums = []

    def reduce(tensor: Tensor) -> Tensor:
        sums.append(tensor.shape)
        return tensor + torch.eye(*tensor.shape, dtype=tensor.dtype)

    assert layer.prepare_base_rows(torch.empty(0, IN), Span(OUT, OUT), reduce).shape == (0, IN)
    assert layer.init_rows("lora_B", Span(OUT, OUT)).shape == (0, R)
    assert layer.init_rows("magnitude", Span(OUT, OUT)).shape == (0,)
    assert len(sums) == 4 * 5


# -- embedding -------------------------------------------------------------------------------------
