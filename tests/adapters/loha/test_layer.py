import pytest
import torch
from torch import Tensor, nn

from dist_peft.adapters.loha.layer import LohaLinear
from dist_peft.adapters.low_rank.module import LowRankSpec
from dist_peft.core.span import row_span
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout
from tests.support.adapters import freeze, int_codec

IN, OUT = 32, 20


def layer(r: int, arithmetic: torch.dtype = torch.float32) -> LohaLinear:
    torch.manual_seed(0)
    base = freeze(nn.Linear(IN, OUT), int_codec())
    dropout = SampleDropout(0.0, "a.b", DropoutPosition(0))
    made = LohaLinear(base, "a.b", LowRankSpec(r, 1.5, arithmetic, 3), dropout)
    for name, (size, _) in made.shapes.items():
        rows = [made.init_rows(name, row_span(size, 3, rank)) for rank in range(3)]
        setattr(made, name, nn.Parameter(torch.cat(rows)))
    return made


def slow(made: LohaLinear, x: Tensor) -> Tensor:
    """FedPara's proposition 1, dense, in float64."""
    first = made.hada_w1_a.double() @ made.hada_w1_b.double()
    change = 1.5 * first * (made.hada_w2_a.double() @ made.hada_w2_b.double())
    weight = made.base.dequantize_weight(torch.float32).double() + change
    assert made.base.bias is not None
    return x.double() @ weight.T + made.base.bias.double()


@pytest.mark.parametrize("arithmetic", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("r", [3, 5])
def test_output_and_gradients_equal_the_dense_sum(r: int, arithmetic: torch.dtype) -> None:
    made = layer(r, arithmetic)
    assert made.multiplies_factors == (r == 3)
    x = torch.randn(2, 3, IN, requires_grad=True)
    assert torch.equal(made(x), made.base(x))
    made.hada_w2_b.data.normal_()
    results = []
    for function in (made, lambda values: slow(made, values)):
        y = function(x)
        gradients = torch.autograd.grad(y.double().square().sum(), (x, *made.parameters())[:-2])
        results.append((y.double(), *gradients))
    tolerance = 1e-4 if arithmetic == torch.float32 else 3e-2
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < tolerance * expected.norm()


def test_initialized_as_in_peft() -> None:
    """Uniform in [-1, 1] / sqrt(columns), and one factor zero."""
    made = layer(3)
    assert not made.hada_w2_b.any()
    for name, columns in (("hada_w1_a", 3), ("hada_w1_b", IN), ("hada_w2_a", 3)):
        value = getattr(made, name)
        assert 0.8 * columns**-0.5 < float(value.abs().max()) <= columns**-0.5
    assert not torch.equal(made.hada_w1_a, made.hada_w2_a)
