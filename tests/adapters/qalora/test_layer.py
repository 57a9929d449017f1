import pytest
import torch
from torch import Tensor, nn

from dist_peft.adapters.low_rank.module import LowRankSpec
from dist_peft.adapters.qalora.layer import QaLoraLinear, pool_groups
from dist_peft.core.span import Span, row_span
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout
from tests.support.adapters import freeze, int_codec

IN, OUT, SIZE, R, S = 48, 20, 16, 3, 0.5


def layer(
    p: float = 0.0, size: int = SIZE, arithmetic: torch.dtype = torch.float32
) -> tuple[QaLoraLinear, DropoutPosition]:
    torch.manual_seed(0)
    base = freeze(nn.Linear(IN, OUT), int_codec())
    position = DropoutPosition(5)
    spec = LowRankSpec(R, S, arithmetic, seed=5)
    made = QaLoraLinear(base, "a.b", spec, size, SampleDropout(p, "a.b", position), "cpu")
    made.lora_A.data = torch.randn(R, IN // size)
    made.lora_B.data = torch.randn(OUT, R)
    return made, position


def slow(made: QaLoraLinear, x: Tensor) -> Tensor:
    """Algorithm 1 element by element, in float64."""
    y = made.base(x).double()
    A, B = made.lora_A.double(), made.lora_B.double()
    for out in range(OUT):
        for column in range(IN):
            change = sum(B[out, i] * A[i, column // made.pool_size] for i in range(R))
            y[..., out] += S * change * x[..., column].double()
    return y


@pytest.mark.parametrize("size", [16, 48])
def test_equals_the_slow_sum(size: int) -> None:
    made, _ = layer(size=size)
    x = torch.randn(2, 3, IN)
    with torch.no_grad():
        torch.testing.assert_close(made(x).double(), slow(made, x), rtol=1e-5, atol=1e-5)


def test_pool_sums_neighbours() -> None:
    x = torch.arange(12.0).view(2, 6)
    assert torch.equal(pool_groups(x, 3), torch.tensor([[3.0, 12.0], [21.0, 30.0]]))
    assert pool_groups(x.bfloat16(), 2).dtype == torch.bfloat16


def test_gradients() -> None:
    made, _ = layer()
    x = torch.randn(2, 3, IN)
    made(x).square().sum().backward()
    grads = made.lora_A.grad, made.lora_B.grad
    made.lora_A.grad = made.lora_B.grad = None
    slow(made, x).square().sum().backward()
    for got, want in zip(grads, (made.lora_A.grad, made.lora_B.grad), strict=True):
        assert got is not None and want is not None
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert made.base.packed.grad is None


def test_output_has_the_base_type() -> None:
    made, _ = layer(arithmetic=torch.float32)
    assert made(torch.randn(2, IN).bfloat16()).dtype == torch.bfloat16


def test_dropout_masks_sums_by_sample() -> None:
    made, position = layer(p=0.5)
    made.lora_A.data = torch.eye(R)  # one inner value a pool group
    made.lora_B.data = torch.ones(OUT, R)
    x = torch.ones(2, 5, IN)
    position.begin_micro_batch(3, torch.tensor([8, 9]))
    first = made(x) - made.base(x)
    # a group is dropped or kept as a whole: k of 3 groups remain, doubled
    steps = (first / (S * SIZE * 2)).round()
    torch.testing.assert_close(first, steps * S * SIZE * 2, rtol=1e-4, atol=1e-4)
    assert steps.unique().numel() > 1
    position.begin_micro_batch(3, torch.tensor([9]))
    assert torch.equal((made(x[:1]) - made.base(x[:1]))[0], first[1])  # alone, the same mask
    made.eval()
    torch.testing.assert_close(made(x) - made.base(x), torch.full_like(first, S * SIZE * 3))


def test_start() -> None:
    made, _ = layer()
    A = made.init_rows("lora_A", Span(0, R))
    assert A.shape == (R, IN // SIZE)
    assert 0 < A.abs().max() <= IN**-0.5
    parts = [made.init_rows("lora_A", row_span(R, 2, rank)) for rank in range(2)]
    assert torch.equal(torch.cat(parts), A)
    assert not made.init_rows("lora_B", Span(0, OUT)).any()
