"""Routers among PEFT's tensors, and other whole modules that are none."""

import torch

from dist_peft.adapters.classifier_head.router_format import join_peft_routers, split_peft_routers
from dist_peft.adapters.protocol import PublicAdapter, PublicHead

ROUTER = "model.layers.0.mlp.gate.weight"
LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_joined_and_split_again() -> None:
    factors = {LORA: torch.ones(2, 3)}
    public = PublicAdapter(
        {"peft_type": "LORA", "task_type": "CAUSAL_LM"},
        factors,
        head=PublicHead((), {ROUTER: torch.zeros(4, 3)}),
    )
    config, tensors = join_peft_routers(public)
    assert config["modules_to_save"] == ["mlp.gate"]
    assert tensors.keys() == {LORA, f"base_model.model.{ROUTER}"}
    found = split_peft_routers(config, tensors)
    assert found is not None
    again, others, head = found
    assert again["modules_to_save"] is None and others == factors
    assert head.labels == () and torch.equal(head.tensors[ROUTER], torch.zeros(4, 3))


def test_other_whole_modules_are_no_routers() -> None:
    config = {"task_type": "CAUSAL_LM", "modules_to_save": ["lm_head"]}
    tensors = {"base_model.model.lm_head.weight": torch.zeros(2, 2)}
    assert split_peft_routers(config, tensors) is None
    assert split_peft_routers({**config, "modules_to_save": None}, tensors) is None
    gates = {**config, "modules_to_save": ["mlp.gate"], "task_type": "SEQ_CLS"}
    assert split_peft_routers(gates, {f"base_model.model.{ROUTER}": torch.zeros(1)}) is None
