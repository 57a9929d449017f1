import torch
from torch import Tensor, nn

from dist_peft.adapters.low_rank.linear_layer import LowRankLinear
from dist_peft.adapters.low_rank.module import LowRankSpec
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout
from tests.support.adapters import freeze


class Ones(LowRankLinear):
    starts_at_zero = ""

    def _compute_update(self, x: Tensor) -> Tensor:
        return torch.ones(*x.shape[:-1], self.base.out_features)

    def _draw_initial_values(self, name: str) -> Tensor:
        raise AssertionError


def test_the_change_is_added_in_the_bases_type_and_switched_off() -> None:
    base = freeze(nn.Linear(4, 3))
    spec = LowRankSpec(1, 1.0, torch.float32, 0)
    made = Ones(base, "a", spec, SampleDropout(0.0, "a", DropoutPosition(0)))
    x = torch.randn(2, 4).bfloat16()
    assert made(x).dtype == base(x).dtype
    torch.testing.assert_close(made(x), (base(x) + 1).to(base(x).dtype))
    made.is_enabled = False
    assert torch.equal(made(x), base(x))
