from typing import Any

import pytest
import torch

from dist_peft.adapters.method_table import make_adapter
from dist_peft.adapters.qalora.layer import QaLoraLinear
from dist_peft.core.config.run import QaLoraConfig
from dist_peft.core.errors import UserError
from dist_peft.quant.codec import Codec
from tests.support.adapters import (
    RAW,
    adapted,
    adapter_modules,
    disturb,
    frozen_model,
    gathered,
    ids,
    int_codec,
    tiny_llama,
)


def attach(codec: Codec = RAW, **settings: Any) -> Any:
    model = frozen_model(tiny_llama(), codec)
    adapter = make_adapter(QaLoraConfig(**settings), seed=0, arithmetic=torch.float32)
    adapter.attach_to_model(model)
    return model


def test_structure() -> None:
    modules = adapter_modules(attach(int_codec()))
    assert len(modules) == 14
    for module in modules.values():
        assert isinstance(module, QaLoraLinear)
        assert module.pool_size == 16
        assert module.shapes["lora_A"] == (16, module.base.in_features // 16)
    pooled = attach(int_codec(), pool_size=32, target_modules=["q_proj"], r=2)
    assert {m.shapes["lora_A"] for m in adapter_modules(pooled).values()} == {(2, 1)}


def test_an_untrained_adapter_changes_nothing() -> None:
    original = tiny_llama(bias=True)
    model, adapter = adapted(original, int_codec(), method=QaLoraConfig)
    assert torch.equal(model(ids()).logits, frozen_model(original, int_codec())(ids()).logits)
    assert adapter.list_init_factors() == () and adapter.get_lr_scale("x.lora_B") == 1.0


def test_only_the_adapter_learns() -> None:
    model, _ = adapted(tiny_llama(), int_codec(2), method=QaLoraConfig, r=4)
    disturb(model)
    model(ids()).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("lora_" in name), (
            name
        )


@pytest.mark.parametrize(
    ("codec", "settings", "message"),
    [
        (RAW, {}, "q_proj is stored as raw, which has none; set base.quant.kind to int"),
        (
            int_codec(),
            {"target_modules": ["q_proj", "lm_head"]},
            "lm_head is stored as raw.* or leave the output head out",
        ),
        (
            int_codec(),
            {"pool_size": 24},
            "pool_size 24 is no multiple of base.quant.group_size 16: .*two pool groups",
        ),
        (int_codec(), {"pool_size": 8}, "pool_size 8 is no multiple"),
        (
            int_codec(),
            {"pool_size": 32},
            r"in_features of model\.layers\.0\.mlp\.down_proj \(48\), model\.layers\.1.*"
            "not divisible by adapter.pool_size; choose a size",
        ),
    ],
)
def test_refused(codec: Codec, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        attach(codec, **settings)


def test_public_form() -> None:
    model, adapter = adapted(
        tiny_llama(),
        int_codec(),
        method=QaLoraConfig,
        r=4,
        alpha=6,
        rank_pattern={"k_proj": 2},
        target_modules=["q_proj", "k_proj"],
    )
    public = adapter.to_public_adapter(gathered(model), "tiny/base")
    config = public.config
    assert (config["peft_type"], config["qalora_pool"]) == ("QALORA", "sum")
    assert (config["qalora_group_size"], config["r"], config["lora_alpha"]) == (16, 4, 6)
    assert config["rank_pattern"] == {"k_proj": 2}
    assert config["target_modules"] == ["k_proj", "q_proj"]
    shapes = {k.split("self_attn.")[1]: tuple(v.shape) for k, v in public.tensors.items()}
    assert shapes == {
        "q_proj.lora_A.weight": (4, 2),
        "q_proj.lora_B.weight": (32, 4),
        "k_proj.lora_A.weight": (2, 2),
        "k_proj.lora_B.weight": (16, 2),
    }
