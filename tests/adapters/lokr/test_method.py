import copy

import pytest
import torch
from torch import nn

from dist_peft.adapters.lokr.layer import LokrLinear
from dist_peft.adapters.method_table import make_adapter
from dist_peft.core.config.run import LokrConfig
from dist_peft.core.errors import UserError
from tests.support.adapters import adapted, freeze, tiny_llama


def test_patterns_choose_rank_and_scaling() -> None:
    _, adapter = adapted(
        tiny_llama(), method=LokrConfig, r=2, alpha=3.0, rank_pattern={"o_proj": 1}
    )
    for path, made in adapter.layers.items():
        assert isinstance(made, LokrLinear)
        r = 1 if path.endswith("o_proj") else 2
        assert (made.spec.r, made.spec.scaling) == (r, 3.0 / r)


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (None, "its 31 outputs and 37 inputs have no divisor but 1; leave it out of"),
        (
            5,
            "its 31 outputs .* have, up to adapter.decompose_factor 5, no divisor but 1; choose",
        ),
    ],
)
def test_sizes_without_divisors_are_refused(factor: int | None, message: str) -> None:
    model = nn.Sequential(freeze(nn.Linear(37, 31)))
    config = LokrConfig(decompose_factor=factor)
    adapter = make_adapter(config, seed=0, arithmetic=torch.float32)
    with pytest.raises(UserError, match=rf"adapter\.kind lokr cannot factor 0: {message}"):
        adapter.attach_to_model(copy.deepcopy(model))
