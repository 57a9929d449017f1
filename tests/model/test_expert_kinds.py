"""Kinds of experts that ``transformers`` has, and their routers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.model.expert_kinds import (
    ExpertKind,
    describe_experts,
    find_expert_modules,
    find_own_gate,
    find_router_linears,
)
from dist_peft.model.skeleton import build_skeleton
from tests.support.tiny_models import MIXTURES, save_model


class OwnExperts(nn.Module):
    """Of a class that is known nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.zeros(2, 3, 4))


def experts_of(config: tf.PretrainedConfig) -> list[nn.Module]:
    with torch.device("meta"):
        return find_expert_modules([tf.AutoModelForCausalLM.from_config(config)])


def test_routers_stay_unquantized(tmp_path: Path) -> None:
    save_model(MIXTURES["qwen2_moe"], tmp_path)
    model = build_skeleton(BaseConfig(path="unused"), tmp_path).model
    block = model.model.layers[0].mlp
    assert block.gate.weight.dtype == torch.bfloat16
    assert type(block.shared_expert_gate) is nn.Linear
    assert block.shared_expert_gate.weight.dtype == torch.bfloat16
    assert block.shared_expert.up_proj.codec.name == block.experts.down_proj.codec.name == "nf4"


def test_a_router_within_a_module_of_its_own() -> None:
    config = tf.HunYuanMoEV1Config(
        **_SMALL, num_experts=3, moe_topk=2, moe_intermediate_size=8, head_dim=8
    )
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config)
    block = model.model.layers[0].mlp
    assert find_router_linears(model, [block.experts]) == {id(block.gate.wg)}


_SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 20,
}


def test_experts_that_compute_as_declared_ones_without_a_declaration() -> None:
    """Step 3.7 clamps the gate after its activation."""
    modeling = pytest.importorskip("transformers.models.step3p7.modeling_step3p7")
    config = tf.Step3p7Config().text_config
    config.num_local_experts, config.hidden_size, config.moe_intermediate_size = 3, 16, 8
    with torch.device("meta"):
        experts = modeling.Step3p7Experts(config, swiglu_limit=0.5)
    assert find_expert_modules([nn.ModuleList([experts])]) == [experts]
    assert describe_experts(experts) == ExpertKind()
    gate = find_own_gate(experts)
    assert gate is not None
    assert torch.equal(gate(torch.tensor([[4.0, -3.0]])), torch.tensor([[-0.25]]))


def test_kinds_of_experts() -> None:
    assert len(experts_of(tf.OlmoeConfig(**_SMALL, num_experts=3))) == 1
    assert experts_of(tf.LlamaConfig(**_SMALL)) == []
    assert len(experts_of(tf.GptOssConfig(**_SMALL, num_local_experts=3))) == 1
    nemotron = tf.NemotronHConfig(**_SMALL, layer_types=["moe"], n_routed_experts=3, head_dim=8)
    (module,) = experts_of(nemotron)
    assert describe_experts(module) == ExpertKind(("up_proj", "down_proj"))
    (module,) = experts_of(tf.Llama4TextConfig(**_SMALL, num_local_experts=3, head_dim=8))
    both = ("gate_up_proj", "down_proj")
    assert describe_experts(module) == ExpertKind(transposed=both, form="scaled_inputs")
    jetmoe = experts_of(tf.JetMoeConfig(**_SMALL, num_local_experts=3, kv_channels=8))
    assert len(jetmoe) == 4 and all(describe_experts(m).form == "one_product" for m in jetmoe)
    with pytest.raises(UserError, match="class OwnExperts, whose products transformers does not"):
        find_expert_modules([OwnExperts()])
