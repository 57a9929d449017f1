import pytest
import torch
from torch import Tensor, nn

from dist_peft.adapters.ia3.layer import Ia3Linear
from dist_peft.core.config.run import QuantConfig
from dist_peft.core.span import Span, row_span
from dist_peft.quant.codec import Codec, make_codec
from tests.support.adapters import RAW, freeze, int_codec

IN, OUT = 48, 20
NF4 = make_codec(QuantConfig(kind="nf4", group_size=16), torch.float32)
CODECS = {"raw": RAW, "nf4": NF4, "int4": int_codec(), "int2": int_codec(2)}


def layer(codec: Codec, rescales_input: bool) -> Ia3Linear:
    torch.manual_seed(0)
    base = freeze(nn.Linear(IN, OUT), codec)
    made = Ia3Linear(base, "a.b", rescales_input=rescales_input, device="cpu")
    made.ia3_l.data = torch.randn(made.shapes["ia3_l"])
    return made


def slow(made: Ia3Linear, x: Tensor) -> Tensor:
    """Section 3.3 element by element, in float64."""
    weight, vector = made.base.dequantize_weight(torch.float32).double(), made.ia3_l.double()
    bias = made.base.bias
    assert bias is not None
    columns = []
    for out in range(OUT):
        total = bias[out].double()
        for column in range(IN):
            factor = vector[column] if made.rescales_input else 1.0
            total = total + weight[out, column] * factor * x[..., column].double()
        columns.append(total if made.rescales_input else vector[out] * total)
    return torch.stack(columns, -1)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("rescales_input", [False, True])
def test_output_and_gradients_equal_the_slow_sum(codec: str, rescales_input: bool) -> None:
    made = layer(CODECS[codec], rescales_input)
    x = torch.randn(2, 3, IN, requires_grad=True)
    results = []
    for function in (made, lambda values: slow(made, values)):
        y = function(x)
        gradients = torch.autograd.grad(y.double().square().sum(), (x, made.ia3_l))
        results.append((y.double(), *gradients))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rescales_input", [False, True])
def test_vectors_stay_float32_beside_bfloat16_activations(rescales_input: bool) -> None:
    """In bfloat16 1.003 would be 1, and nothing would change."""
    assert torch.tensor(1.003).bfloat16() == 1
    made = layer(RAW, rescales_input)
    x = torch.randn(4096, IN).bfloat16()
    made.ia3_l.fill_(1.0)
    before = made(x)
    made.ia3_l.fill_(1.003)
    after = made(x)
    assert after.dtype == torch.bfloat16
    grown = float(after.double().abs().sum() / before.double().abs().sum())
    assert grown == pytest.approx(1.003, abs=1e-3)


@pytest.mark.parametrize("rescales_input", [False, True])
def test_initialized_to_one_on_any_number_of_ranks(rescales_input: bool) -> None:
    made = layer(RAW, rescales_input)
    size = IN if rescales_input else OUT
    parts = [made.init_rows("ia3_l", row_span(size, 3, rank)) for rank in range(3)]
    assert torch.equal(torch.cat(parts), torch.ones(size))
    assert made.init_rows("ia3_l", Span(2, 2)).shape == (0,)
    made.ia3_l.data = torch.cat(parts)
    x = torch.randn(2, IN)
    assert torch.equal(made(x), made.base(x))
