"""What every low-rank method does; the tests of each method have the rest."""

from typing import Any

import pytest
import torch
from torch import nn

from dist_peft.adapters.low_rank.method import LowRankAdapter
from dist_peft.adapters.method_table import make_adapter
from dist_peft.adapters.protocol import Adapter
from dist_peft.core.config.run import LoraConfig, LowRankConfig, QaLoraConfig
from dist_peft.core.errors import UserError
from tests.support.adapters import (
    adapted,
    adapter_modules,
    frozen_model,
    gathered,
    int_codec,
    tiny_llama,
)

METHODS = pytest.mark.parametrize("method", [LoraConfig, QaLoraConfig])


def attach(model: nn.Module, method: type[LowRankConfig], **settings: Any) -> Adapter:
    adapter = make_adapter(method(**settings), seed=0, arithmetic=torch.float32)
    adapter.attach_to_model(model)
    return adapter


@METHODS
def test_patterns_and_targets(method: type[LowRankConfig]) -> None:
    model = frozen_model(tiny_llama(), int_codec())
    patterns = {"rank_pattern": {"k_proj": 5}, "alpha_pattern": {r"layers\.1\..*": 12.0}}
    adapter = attach(model, method, r=4, alpha=8, target_modules=["q_proj", "k_proj"], **patterns)
    assert isinstance(adapter, LowRankAdapter)
    specs = {path: layer.spec for path, layer in adapter_modules(model).items()}
    assert {path: (s.r, s.scaling) for path, s in specs.items()} == {
        "model.layers.0.self_attn.q_proj": (4, 2.0),
        "model.layers.0.self_attn.k_proj": (5, 8 / 5),
        "model.layers.1.self_attn.q_proj": (4, 3.0),
        "model.layers.1.self_attn.k_proj": (5, 12 / 5),
    }


@METHODS
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_prj"]}, "did you mean q_proj"),
        ({"rank_pattern": {"nothing": 2}}, "rank_pattern.*matches no adapted module"),
        ({"alpha_pattern": {"nothing": 2.0}}, "alpha_pattern.*matches no adapted module"),
    ],
)
def test_what_matches_nothing(
    method: type[LowRankConfig], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        attach(frozen_model(tiny_llama(), int_codec()), method, **settings)


@METHODS
def test_what_was_not_gathered_is_not_saved(method: type[LowRankConfig]) -> None:
    model, adapter = adapted(tiny_llama(), int_codec(), method=method, r=4)
    tensors = gathered(model)
    name = next(iter(tensors))
    with pytest.raises(RuntimeError, match=r"has shape .*not gathered"):
        adapter.to_public_adapter({**tensors, name: torch.empty(0)}, "base")
    del tensors[name]
    with pytest.raises(RuntimeError, match="is absent"):
        adapter.to_public_adapter(tensors, "base")
