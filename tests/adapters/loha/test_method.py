import pytest

from dist_peft.adapters.loha.layer import LohaLinear
from dist_peft.core.config.run import LohaConfig
from dist_peft.core.errors import UserError
from tests.support.adapters import adapted, tiny_llama


def test_patterns_choose_rank_and_scaling() -> None:
    _, adapter = adapted(
        tiny_llama(), method=LohaConfig, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 3.0}
    )
    for path, made in adapter.layers.items():
        assert isinstance(made, LohaLinear)
        wanted = (2, 1.5) if path.endswith("v_proj") else (8, 1.0)
        assert (made.spec.r, made.spec.scaling) == wanted


def test_rank_that_no_product_can_have_is_refused() -> None:
    with pytest.raises(UserError, match=r"rank of at most 16 in model\.layers\.0\.self_attn\.k_"):
        adapted(tiny_llama(), method=LohaConfig, r=17)
