from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_peft.adapters.bottleneck.layer import BottleneckLayer, BottleneckSpec
from dist_peft.adapters.fusion.attention_meter import AttentionMeter
from dist_peft.adapters.fusion.layer import FusionLayer, IdentityRegularizer, init_near_identity
from dist_peft.core.span import Span, row_span
from dist_peft.model.adapter_module import AdapterModule
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout

D, N = 12, 3
BASE = nn.Linear(1, 1)


def layer(reads: Any = "sum", dropout: float = 0.0, regularization: float = 0.0) -> Any:
    """Filled with its start, over adapters of widths 2, 3 and 4."""
    position = DropoutPosition(1)
    silent = SampleDropout(0.0, "a.b", position)
    adapters = {}
    for number in range(N):
        spec = BottleneckSpec(
            hidden=D,
            bottleneck=2 + number,
            activation="relu",
            scaling=1.5,
            reads=reads,
            init="bert",
            arithmetic=torch.float32,
            seed=number,
        )
        own = f"a.b.adapters.{number}"
        adapters[f"n{number}"] = BottleneckLayer(BASE, own, spec, silent, train=False)
    drop = SampleDropout(dropout, "a.b", position)
    pull = IdentityRegularizer(regularization)
    made = FusionLayer(BASE, "a.b", adapters, drop, pull, AttentionMeter(), seed=7)
    assert all(p.is_meta and p.dtype == torch.float32 for p in made.parameters())
    for module in (made, *adapters.values()):
        for name, shape in module.shapes.items():
            trains = getattr(module, name).requires_grad
            rows = module.init_rows(name, Span(0, shape[0]))
            module.register_parameter(name, nn.Parameter(rows, requires_grad=trains))
    return made


def moved(made: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    for parameter in made.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return made


def tensors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 5, D, generator=generator), torch.randn(2, 5, D, generator=generator)


def slow(made: Any, f: Tensor, x: Tensor) -> Tensor:
    """Token by token as section 3 of the paper, each key and value made by itself."""
    value = torch.eye(D) + made.value_change
    result = torch.empty_like(f)
    for b in range(f.shape[0]):
        for s in range(f.shape[1]):
            h = {"output": f[b, s], "sum": x[b, s] + f[b, s]}[made.adapters[0].spec.reads]
            query = made.query_weight @ h + made.query_bias
            outputs = [a.compute_residual(h) for a in made.adapters]
            keys = [made.key_weight @ u + made.key_bias for u in outputs]
            attention = torch.stack([query @ key for key in keys]).softmax(0)
            result[b, s] = f[b, s] + sum(
                a * (value @ u) for a, u in zip(attention, outputs, strict=True)
            )
    return result


@pytest.mark.parametrize("reads", ["output", "sum"])
def test_formula(reads: str) -> None:
    """Outputs and gradients."""
    made = moved(layer(reads))
    f, x = (t.requires_grad_() for t in tensors())
    learns = [p for p in made.parameters() if p.requires_grad]
    assert len(learns) == 4  # without the keys' bias, which cancels
    found, expected = made(f, x), slow(made, f, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    mine = torch.autograd.grad(found.square().sum(), [f, *learns])
    others = torch.autograd.grad(expected.square().sum(), [f, *learns])
    for a, b in zip(mine, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_start() -> None:
    """Nearly the mean of the adapters where attention is even."""
    made = layer("output")
    assert isinstance(made, AdapterModule) and isinstance(made, AdapterModule)
    assert torch.equal(init_near_identity(Span(2, 4), 5), init_near_identity(Span(0, 5), 5)[2:4])
    whole = init_near_identity(Span(0, 5), 5) + torch.eye(5)
    assert torch.equal(whole, torch.full((5, 5), 1e-6).fill_diagonal_(1.0))
    f, _ = tensors()
    made.query_weight.data.zero_()
    mean = torch.stack([a.compute_residual(f) for a in made.adapters]).mean(0)
    torch.testing.assert_close(made(f), f + mean, rtol=1e-4, atol=1e-6)
    for name, shape in made.shapes.items():
        rows = [made.init_rows(name, row_span(shape[0], 5, rank)) for rank in range(5)]
        assert torch.equal(torch.cat(rows), made.init_rows(name, Span(0, shape[0])))


def test_dropout_is_on_the_scores() -> None:
    """With p near 1 attention is even; the keys' bias matters, so it learns."""
    made = moved(layer("output", dropout=0.999999))
    made.dropout.position.begin_micro_batch(0, torch.tensor([3, 4]))
    f, _ = tensors()
    mean = torch.stack([a.compute_residual(f) for a in made.adapters]).mean(0)
    expected = f + mean @ (torch.eye(D) + made.value_change).T
    torch.testing.assert_close(made(f), expected, rtol=1e-4, atol=1e-5)
    assert made.key_bias.requires_grad
    assert not torch.allclose(made.eval()(f), expected)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("parts", "scale"), [(1, 1.0), (3, 1.0), (4, 2.0)])
def test_penalty(recompute: bool, parts: int, scale: float) -> None:
    """The sum over all passes has 2 lambda (V - I) once, times what the loss is scaled by."""
    made = moved(layer(regularization=0.3))

    def gradient(penalized: bool) -> Tensor:
        made.zero_grad()
        for part in range(parts):
            f, x = tensors()
            f, x = f + part, x.requires_grad_()
            out = checkpoint(made, f, x, use_reentrant=False) if recompute else made(f, x)
            loss = out.square().mean()
            if penalized:
                made.pull.attach_to_loss(loss, parts)
            (loss * scale).backward()
            made.pull.strength = 0.0
        grad: Tensor = made.value_change.grad
        return grad.clone()

    growth = gradient(True) - gradient(False)
    torch.testing.assert_close(growth, scale * 0.6 * made.value_change, rtol=1e-4, atol=1e-5)


def test_attention_is_metered() -> None:
    made = moved(layer("output"))
    f, _ = tensors()
    weights = torch.tensor([[1.0, 1.0, 0, 0, 0], [0, 0, 0, 0, 1.0]])
    made(f)
    assert not made.meter.sums
    with made.meter.count_attention(weights, [1, 0], 2):
        made(f)
    attention = made._compute_attention(
        f, torch.stack([a.compute_residual(f) for a in made.adapters], -2)
    )
    expected = torch.stack([attention[1, 4], attention[0, :2].sum(0)]).double()
    torch.testing.assert_close(made.meter.sums["a.b"], expected)
