import torch
from torch import Tensor

from dist_peft.adapters.low_rank.module import LowRankModule, LowRankSpec
from dist_peft.core.span import Span, row_span


class Plain(LowRankModule):
    starts_at_zero = "B"

    def __init__(self, path: str = "a.b", arithmetic: torch.dtype = torch.float32) -> None:
        super().__init__(path, LowRankSpec(3, 0.5, arithmetic, seed=7))
        self._add_meta_parameter("A", (3, 5), "meta", train=True)
        self._add_meta_parameter("B", (7, 3), "meta", train=True)

    def _draw_initial_values(self, name: str) -> Tensor:
        return torch.randn(self.shapes[name], generator=self._make_generator(name))


def test_parameters() -> None:
    module = Plain()
    assert module.shapes == {"A": (3, 5), "B": (7, 3)}
    for name, parameter in module.named_parameters():
        assert parameter.is_meta and parameter.dtype == torch.float32, name


def test_start_does_not_depend_on_the_ranks() -> None:
    whole = Plain().init_rows("A", Span(0, 3))
    parts = [Plain().init_rows("A", row_span(3, 2, rank)) for rank in range(2)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(Plain("a.c").init_rows("A", Span(0, 3)), whole)
    assert torch.equal(Plain().init_rows("B", Span(2, 6)), torch.zeros(4, 3))


def test_product_computes_in_the_arithmetic_type() -> None:
    x, A, B = torch.randn(2, 4, 5), torch.randn(3, 5), torch.randn(7, 3)
    expected = torch.einsum("or,ri,bsi->bso", B, A, x) * 0.5
    torch.testing.assert_close(Plain()._multiply_factors(x, A, B), expected)
    half = Plain(arithmetic=torch.bfloat16)._multiply_factors(x, A, B)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.1)
