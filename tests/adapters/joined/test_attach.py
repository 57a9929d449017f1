from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from dist_peft.adapters.joined.attach import attach_joined, get_alone_name
from dist_peft.adapters.joined.layer import JoinedLayer
from dist_peft.adapters.joined.row_shares import RowShares
from dist_peft.adapters.lora.layer import LoraLinear
from dist_peft.adapters.lora.method import LoraAdapter
from dist_peft.core.config.run import LoraConfig
from dist_peft.core.errors import UserError
from tests.support.adapters import frozen_model, tiny_llama


def make_adapter(**settings: Any) -> LoraAdapter:
    return LoraAdapter(LoraConfig(**settings), seed=0, arithmetic=torch.float32)


def test_names_are_those_of_each_alone() -> None:
    """Whatever the others target."""
    settings: list[dict[str, Any]] = [
        {"r": 2},
        {"r": 3, "target_modules": ["q_proj"]},
        {"r": 5, "target_modules": [r".*layers\.1.*\.(q|o)_proj"]},
    ]
    model, adapters = frozen_model(tiny_llama()), [make_adapter(**own) for own in settings]
    attach_joined(model, adapters, RowShares())
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    for number, own in enumerate(settings):
        alone = frozen_model(tiny_llama())
        make_adapter(**own).attach_to_model(alone)
        expected = {n: tuple(p.shape) for n, p in alone.named_parameters() if p.requires_grad}
        found = {get_alone_name(name, number): shape for name, shape in shapes.items()}
        assert {name: shape for name, shape in found.items() if name} == expected
        frozen = {n for n, p in alone.named_parameters() if not p.requires_grad}
        if number == 0:  # it targets all that any does
            assert frozen == {n for n, p in model.named_parameters() if not p.requires_grad}
    joined = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(joined, JoinedLayer) and list(joined.points) == ["0", "1"]
    assert get_alone_name("model.layers.0.self_attn.q_proj.base.packed", 0) is None


def test_layers_without_a_change_are_refused() -> None:
    """Such as those of experts."""
    model, adapter = frozen_model(tiny_llama()), make_adapter()
    with (
        mock.patch.object(LoraLinear, "joined_form", None),
        pytest.raises(UserError, match="q_proj are experts of a mixture"),
    ):
        attach_joined(model, [adapter], RowShares())
    assert isinstance(model, nn.Module)
