import pytest
import torch
from torch import Tensor, nn

from dist_peft.adapters.adalora.layer import AdaLoraLinear, OrthogonalityPenalty
from dist_peft.adapters.low_rank.module import LowRankSpec
from dist_peft.core.span import row_span
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout
from tests.support.adapters import freeze, int_codec

IN, OUT, R = 32, 20, 5


def layer(weight: float, arithmetic: torch.dtype = torch.float32) -> AdaLoraLinear:
    torch.manual_seed(0)
    penalty = OrthogonalityPenalty()
    penalty.weight = weight
    dropout = SampleDropout(0.0, "a.b", DropoutPosition(0))
    spec = LowRankSpec(R, 1.5, arithmetic, 3)
    made = AdaLoraLinear(freeze(nn.Linear(IN, OUT), int_codec()), "a.b", spec, dropout, penalty)
    for name, shape in made.shapes.items():
        rows = [made.init_rows(name, row_span(shape[0], 3, rank)) for rank in range(3)]
        setattr(made, name, nn.Parameter(torch.cat(rows)))
    return made


def slow(made: AdaLoraLinear, x: Tensor) -> Tensor:
    change = 1.5 * made.lora_B.double() @ made.lora_E.double().diag() @ made.lora_A.double()
    weight = made.base.dequantize_weight(torch.float32).double() + change
    assert made.base.bias is not None
    return x.double() @ weight.T + made.base.bias.double()


def pull(made: AdaLoraLinear) -> Tensor:
    """PEFT's penalty, written out."""
    A, B = made.lora_A.double(), made.lora_B.double()
    return torch.norm(A @ A.T - torch.eye(R)) + torch.norm(B.T @ B - torch.eye(R))


@pytest.mark.parametrize(("weight", "arithmetic"), [(0.0, torch.bfloat16), (0.3, torch.float32)])
def test_output_and_gradients_equal_the_dense_sum_with_the_penalty(
    weight: float, arithmetic: torch.dtype
) -> None:
    made = layer(weight, arithmetic)
    x = torch.randn(2, 3, IN, requires_grad=True)
    assert torch.equal(made(x), made.base(x))
    made.lora_E.data.normal_()
    made.lora_A.data.normal_()
    own = (x, made.lora_A, made.lora_E, made.lora_B)
    # one of two parts of a step, in an engine that scales the loss by 3
    y = made(x)
    loss = y.double().square().sum()
    made.penalty.attach_to_loss(loss, 2)
    found = torch.autograd.grad(loss * 3, own)
    expected_y = slow(made, x)
    whole = 3 * (expected_y.square().sum() + weight / 2 * pull(made))
    expected = torch.autograd.grad(whole, own)
    tolerance = 1e-4 if arithmetic == torch.float32 else 3e-2
    for value, wanted in zip((y, *found), (expected_y, *expected), strict=True):
        assert (value - wanted).norm() < tolerance * wanted.norm()


def test_initialized_as_in_peft() -> None:
    made = layer(0.0)
    assert not made.lora_E.any()
    assert 0.015 < float(made.lora_A.std()) < 0.025 and 0.015 < float(made.lora_B.std()) < 0.025
