"""Which modules have factors of experts."""

import torch
from torch import nn

from dist_peft.adapters.lora.expert_layer import LoraExperts
from dist_peft.adapters.low_rank.module import LowRankSpec
from dist_peft.model.expert_exchange import AdaptsExperts, list_expert_factors
from dist_peft.model.experts import ExpertStack
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout
from dist_peft.quant.codec import RawCodec


def test_factors_of_experts_are_found() -> None:
    """Each position is one expert's, and every expert has as many of each factor."""
    stack = ExpertStack(4, 8, 6, RawCodec(torch.float32), "stack", "meta")
    spec = LowRankSpec(3, 0.5, torch.float32, seed=3)
    layer = LoraExperts(stack, "stack", spec, SampleDropout(0.0, "stack", DropoutPosition(7)))
    assert isinstance(layer, AdaptsExperts) and not isinstance(stack, AdaptsExperts)
    model = nn.ModuleList([nn.Linear(2, 2), layer])
    found = list_expert_factors(model.modules())
    assert [id(factor) for factor in found] == [id(layer.lora_A), id(layer.lora_B)]
    for name, (dimension, positions) in layer.locate_experts().items():
        assert positions.shape == (4, 3)
        whole = layer.get_parameter(name).shape[dimension]
        assert sorted(positions.flatten().tolist()) == list(range(whole))
