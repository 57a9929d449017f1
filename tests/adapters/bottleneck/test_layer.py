import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dist_peft.adapters.bottleneck.layer import (
    ACTIVATIONS,
    BottleneckLayer,
    BottleneckSpec,
    TrainableNorm,
)
from dist_peft.core.span import Span, row_span
from dist_peft.model.adapter_module import AdapterModule
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout

D, M = 12, 3
BASE = nn.Linear(1, 1)


def layer(dropout: float = 0.0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Filled with its start."""
    settings = {"activation": "relu", "scaling": 1.0, "reads": "output", "init": "bert", "seed": 7}
    spec = BottleneckSpec(hidden=D, bottleneck=M, arithmetic=dtype, **{**settings, **changes})
    drop = SampleDropout(dropout, "a.b", DropoutPosition(1))
    made = BottleneckLayer(BASE, "a.b", spec, drop)
    assert all(p.is_meta and p.dtype == torch.float32 for p in made.parameters())
    for name, shape in made.shapes.items():
        made.register_parameter(name, nn.Parameter(made.init_rows(name, Span(0, shape[0]))))
    return made


def moved(made: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    for parameter in made.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator)
    return made


def tensors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 5, D, generator=generator), torch.randn(2, 5, D, generator=generator)


@pytest.mark.parametrize("reads", ["output", "sum", "stream"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_formula(reads: str, activation: str) -> None:
    """Number by number, with the activations that AdapterHub takes from transformers."""
    made = moved(layer(reads=reads, activation=activation, scaling=2.5))
    f, x = tensors()
    act = nn.functional.leaky_relu if activation == "leakyrelu" else ACT2FN[activation]
    expected = torch.empty_like(f)
    for b in range(2):
        for s in range(5):
            h = {"output": f[b, s], "sum": x[b, s] + f[b, s], "stream": x[b, s]}[reads]
            inner = torch.stack([made.down_weight[i] @ h + made.down_bias[i] for i in range(M)])
            inner = act(inner)
            for j in range(D):
                change = made.up_weight[j] @ inner + made.up_bias[j]
                expected[b, s, j] = f[b, s, j] + 2.5 * change
    torch.testing.assert_close(made(f, x), expected, rtol=1e-5, atol=1e-6)


def test_stream_is_needed_where_it_is_read() -> None:
    f, _ = tensors()
    assert layer()(f).shape == f.shape
    with pytest.raises(AssertionError, match="no residual stream"):
        layer(reads="sum")(f)


@pytest.mark.parametrize("arithmetic", [torch.bfloat16, torch.float32])
def test_types(arithmetic: torch.dtype) -> None:
    """float32 parameters, output in the base's type."""
    made = moved(layer(dtype=arithmetic, reads="sum"))
    f, x = (t.bfloat16() for t in tensors())
    y = made(f, x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in made.parameters())
    exact = moved(layer(reads="sum"))(f.float(), x.float())
    error = (y.float() - exact).norm() / exact.norm()
    assert error < (0.01 if arithmetic == torch.bfloat16 else 0.003)


def test_start_is_near_the_identity() -> None:
    f, x = tensors()
    for init, size in {"mam_adapter": 0.0, "houlsby": 2e-3, "bert": 8e-3}.items():
        made = layer(init=init, reads="sum")
        change = (made(f, x) - f).norm() / f.norm()
        assert change <= size
        assert (change == 0) == (init == "mam_adapter")
        assert not made.down_bias.any() and not made.up_bias.any()
        assert made.down_weight.std() > 0
    cut = layer(init="houlsby").up_weight
    assert 0 < cut.abs().max() <= 0.02


@pytest.mark.parametrize("init", ["bert", "houlsby", "mam_adapter"])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_start_does_not_depend_on_the_ranks(init: str, ranks: int) -> None:
    made = layer(init=init)
    for name, shape in made.shapes.items():
        spans = [row_span(shape[0], ranks, rank) for rank in range(ranks)]
        rows = torch.cat([made.init_rows(name, span) for span in spans])
        assert torch.equal(rows, getattr(made, name))
    other = layer(init=init, seed=8)
    assert not torch.equal(other.down_weight, made.down_weight)


def test_given_start() -> None:
    made = layer()
    value = torch.randn(D, M)
    made.load_initial_values({"up_weight": value})
    assert torch.equal(made.init_rows("up_weight", Span(2, 5)), value[2:5])


def test_dropout_is_on_the_change_alone() -> None:
    made = moved(layer(dropout=0.5)).train()
    f, _ = tensors()
    made.dropout.position.begin_micro_batch(0, torch.tensor([3, 4]))
    change = made(f) - f
    full = 2 * (made.eval()(f) - f)
    kept = change.abs() > 1e-6
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(change[kept], full[kept], rtol=1e-4, atol=1e-5)


# -- norms -----------------------------------------------------------------------------------------

NORMS = {
    "llama": lambda: LlamaRMSNorm(D),
    "gemma": lambda: GemmaRMSNorm(D),
    "layer norm": lambda: nn.LayerNorm(D),
}


def norm(kind: str) -> tuple[nn.Module, Any]:
    base = NORMS[kind]().requires_grad_(False)
    generator = torch.Generator().manual_seed(9)
    for parameter in base.parameters():
        parameter.data += torch.randn(D, generator=generator) * 0.3
    made = TrainableNorm(base)
    for name in made.shapes:
        made.register_parameter(name, nn.Parameter(made.init_rows(name, Span(0, D))))
    return base, made


@pytest.mark.parametrize("kind", NORMS)
def test_norm_learns(kind: str) -> None:
    base, made = norm(kind)
    x, _ = tensors()
    assert torch.equal(made(x), base(x))
    changed = copy.deepcopy(base)
    for name, parameter in changed.named_parameters():
        change = torch.linspace(-0.1, 0.2, D)
        parameter.data += change
        getattr(made, f"{name}_change").data = change.clone()
    assert torch.equal(made(x), changed(x))
    made(x).sum().backward()
    for name, parameter in changed.named_parameters():
        parameter.requires_grad_()
        changed.zero_grad()
        changed(x).sum().backward()
        torch.testing.assert_close(getattr(made, f"{name}_change").grad, parameter.grad)
        assert getattr(made.base, name) is base._parameters[name]  # nothing is left standing in
        assert base._parameters[name].grad is None


def test_norm_in_bfloat16_sees_small_changes() -> None:
    """In bfloat16 1 + 0.001 is 1."""
    base, made = norm("llama")
    base.to(torch.bfloat16)
    x = tensors()[0].bfloat16()
    before = made(x)
    made.weight_change.data += 0.003
    after = made(x)
    assert after.dtype == torch.bfloat16 and not torch.equal(before, after)


def test_protocols() -> None:
    for module in (layer(), norm("llama")[1]):
        assert isinstance(module, AdapterModule) and isinstance(module, AdapterModule)
    assert layer().base is BASE and BASE not in list(layer().modules())
