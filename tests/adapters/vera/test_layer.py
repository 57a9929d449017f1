import pytest
import torch
from torch import Tensor, nn

from dist_peft.adapters.low_rank.module import LowRankSpec
from dist_peft.adapters.vera.layer import VeraLinear
from dist_peft.adapters.vera.projections import SharedProjections
from dist_peft.core.span import row_span
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout
from tests.support.adapters import freeze, int_codec

IN, OUT, R = 32, 20, 5


def layer(arithmetic: torch.dtype = torch.float32, dropout: float = 0.0) -> VeraLinear:
    torch.manual_seed(0)
    base = freeze(nn.Linear(IN, OUT), int_codec())
    position = DropoutPosition(0)
    position.begin_micro_batch(0, torch.arange(2))
    shared = SharedProjections(torch.randn(R, IN + 7), torch.randn(OUT + 3, R))
    spec = LowRankSpec(R, 1.0, arithmetic, 3)
    made = VeraLinear(base, "a.b", spec, SampleDropout(dropout, "a.b", position), shared, 0.25)
    for name, (size,) in made.shapes.items():
        rows = [made.init_rows(name, row_span(size, 3, rank)) for rank in range(3)]
        setattr(made, name, nn.Parameter(torch.cat(rows)))
    return made


def slow(made: VeraLinear, x: Tensor) -> Tensor:
    """Equation 2 in float64, with the dense change."""
    A, B = made.projections.A[:, :IN].double(), made.projections.B[:OUT].double()
    change = made.vera_lambda_b.double().diag() @ B @ made.vera_lambda_d.double().diag() @ A
    weight = made.base.dequantize_weight(torch.float32).double() + change
    assert made.base.bias is not None
    return x.double() @ weight.T + made.base.bias.double()


def test_starts_at_the_base_from_d_initial() -> None:
    made = layer()
    assert made.vera_lambda_d.tolist() == [0.25] * R and not made.vera_lambda_b.any()
    x = torch.randn(2, 3, IN)
    assert torch.equal(made(x), made.base(x))


@pytest.mark.parametrize("arithmetic", [torch.float32, torch.bfloat16])
def test_output_and_gradients_equal_the_dense_sum(arithmetic: torch.dtype) -> None:
    made = layer(arithmetic)
    made.vera_lambda_b.data.normal_()
    made.vera_lambda_d.data.normal_()
    x = torch.randn(2, 3, IN, requires_grad=True)
    results = []
    for function in (made, lambda values: slow(made, values)):
        y = function(x)
        wanted = (x, made.vera_lambda_d, made.vera_lambda_b)
        gradients = torch.autograd.grad(y.double().square().sum(), wanted)
        results.append((y.double(), *gradients))
    tolerance = 1e-4 if arithmetic == torch.float32 else 3e-2
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < tolerance * expected.norm()


def test_dropout_is_on_the_input_of_the_change() -> None:
    made = layer(dropout=0.5)
    made.vera_lambda_b.data.fill_(1.0)
    x = torch.randn(2, 3, IN)
    made.train()
    expected = slow(made, made.dropout(x)) - made.base(made.dropout(x)) + made.base(x)
    torch.testing.assert_close(made(x).double(), expected, rtol=1e-4, atol=1e-4)
    made.is_enabled = False
    assert torch.equal(made(x), made.base(x))
