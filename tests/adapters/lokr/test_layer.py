import pytest
import torch
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn

from dist_peft.adapters.lokr.layer import LokrLinear, LokrSpec, factorize
from dist_peft.core.span import row_span
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout
from tests.support.adapters import freeze, int_codec

IN, OUT = 32, 30


def layer(r: int, both: bool, arithmetic: torch.dtype = torch.float32) -> LokrLinear:
    torch.manual_seed(0)
    base = freeze(nn.Linear(IN, OUT), int_codec())
    dropout = SampleDropout(0.0, "a.b", DropoutPosition(0))
    made = LokrLinear(base, "a.b", LokrSpec(r, 1.5, arithmetic, 3, both=both), dropout)
    for name, (size, _) in made.shapes.items():
        rows = [made.init_rows(name, row_span(size, 3, rank)) for rank in range(3)]
        setattr(made, name, nn.Parameter(torch.cat(rows)))
    return made


def matrix(made: LokrLinear, name: str) -> Tensor:
    if name in made.shapes:
        return getattr(made, name).double()
    return getattr(made, f"{name}_a").double() @ getattr(made, f"{name}_b").double()


def slow(made: LokrLinear, x: Tensor) -> Tensor:
    """Equation 4 of KronA with torch's own Kronecker product, in float64."""
    change = 1.5 * torch.kron(matrix(made, "lokr_w1"), matrix(made, "lokr_w2"))
    weight = made.base.dequantize_weight(torch.float32).double() + change
    assert made.base.bias is not None
    return x.double() @ weight.T + made.base.bias.double()


@pytest.mark.parametrize("arithmetic", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("r", "both", "names"), [(1, True, 4), (2, False, 3), (9, True, 2)])
def test_output_and_gradients_equal_the_dense_sum(
    r: int, both: bool, names: int, arithmetic: torch.dtype
) -> None:
    made = layer(r, both, arithmetic)
    assert made.sides == (5, 6, 4, 8) and len(made.shapes) == names
    x = torch.randn(2, 3, IN, requires_grad=True)
    assert torch.equal(made(x), made.base(x))
    getattr(made, made.starts_at_zero).data.normal_()
    own = [getattr(made, name) for name in made.shapes]
    results = []
    for function in (made, lambda values: slow(made, values)):
        y = function(x)
        results.append((y.double(), *torch.autograd.grad(y.double().square().sum(), (x, *own))))
    tolerance = 1e-4 if arithmetic == torch.float32 else 3e-2
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < tolerance * expected.norm()


def test_factors_are_pefts() -> None:
    for size in range(1, 130):
        assert factorize(size, None) == factorization(size, -1)
        for factor in (2, 3, 4, 7, 12, 64):
            assert factorize(size, factor) == factorization(size, factor), (size, factor)
