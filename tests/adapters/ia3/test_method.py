import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config as PeftIa3Config
from peft import get_peft_model

from dist_peft.adapters.ia3.layer import Ia3Linear
from dist_peft.adapters.ia3.method import Ia3Adapter
from dist_peft.adapters.method_table import make_adapter
from dist_peft.core.config.run import BaseConfig, Ia3Config
from dist_peft.core.errors import UserError
from dist_peft.model.adapter_module import AdapterModule
from dist_peft.model.skeleton import build_skeleton
from tests.support.adapters import (
    adapted,
    adapter_modules,
    disturb,
    frozen_model,
    gathered,
    ids,
    int_codec,
    tiny_llama,
)
from tests.support.tiny_models import MIXTURES, save_model


def attach(**settings: Any) -> Any:
    model = frozen_model(tiny_llama())
    make_adapter(Ia3Config(**settings), seed=0, arithmetic=torch.float32).attach_to_model(model)
    return model


def test_structure() -> None:
    modules = adapter_modules(attach())
    assert len(modules) == 6
    for path, module in modules.items():
        assert isinstance(module, Ia3Linear) and isinstance(module, AdapterModule)
        assert module.rescales_input == path.endswith("down_proj")
        assert module.shapes == {"ia3_l": (48 if module.rescales_input else 16,)}


@pytest.mark.parametrize(
    ("settings", "inputs"),
    [
        ({"target_modules": ["q_proj", "o_proj"]}, set()),
        ({"target_modules": "all-linear"}, {"down_proj"}),
        ({"feedforward_modules": []}, set()),
        (
            {"target_modules": ["up_proj", "v_proj"], "feedforward_modules": ["mlp.up_proj"]},
            {"up_proj"},
        ),
    ],
)
def test_feedforward_modules(settings: dict[str, Any], inputs: set[str]) -> None:
    modules = adapter_modules(attach(**settings))
    rescaled = {path.rpartition(".")[2] for path, m in modules.items() if m.rescales_input}
    assert rescaled == inputs


def test_an_untrained_adapter_changes_nothing() -> None:
    original = tiny_llama(bias=True)
    model, adapter = adapted(original, int_codec(), method=Ia3Config)
    assert torch.equal(model(ids()).logits, frozen_model(original, int_codec())(ids()).logits)
    assert adapter.list_init_factors() == () and adapter.get_lr_scale("x.ia3_l") == 1.0


def test_only_the_vectors_learn() -> None:
    model, _ = adapted(tiny_llama(), int_codec(2), method=Ia3Config)
    model(ids()).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        learns = name.endswith("ia3_l")
        assert parameter.requires_grad == learns, name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == learns, name


def test_logits_and_gradients_equal_pefts() -> None:
    original = tiny_llama(bias=True)
    model, _ = adapted(original, method=Ia3Config, target_modules=["q_proj", "v_proj", "down_proj"])
    disturb(model)
    config = PeftIa3Config(
        target_modules=["q_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(copy.deepcopy(original), config)
    vectors = {
        name.removeprefix("base_model.model.").removesuffix(".default"): parameter
        for name, parameter in theirs.named_parameters()
        if "ia3_l" in name
    }
    assert len(vectors) == 6
    for name, parameter in vectors.items():
        value = model.get_parameter(name).detach()
        parameter.data = value.reshape(parameter.shape).clone()
    results = []
    for own in (model, theirs):
        logits = own(input_ids=ids()).logits
        logits.square().mean().backward()
        results.append(logits.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    for name, parameter in vectors.items():
        found = model.get_parameter(name).grad
        assert found is not None and parameter.grad is not None
        torch.testing.assert_close(found, parameter.grad.flatten(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["k_prj"]}, r"entry 'k_prj' matches no linear; did you mean k_proj"),
        (
            {"feedforward_modules": ["up_proj"]},
            r"feedforward_modules entry 'up_proj' is the .* of no target; .* has down_proj, k_proj",
        ),
        (
            {"target_modules": ["k_proj", "embed_tokens"]},
            r"'embed_tokens' is the embedding model\.embed_tokens; .*adapter\.kind lora",
        ),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        attach(**settings)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_are_refused(family: str, tmp_path: Path) -> None:
    save_model(MIXTURES[family], tmp_path)
    base = BaseConfig(path=str(tmp_path), quant=None, compute_dtype="float32")
    model = build_skeleton(base, tmp_path).model
    experts = Ia3Config(target_modules="all-linear")
    with pytest.raises(UserError, match=r"ia3 is not for experts such as .*\[k_proj, v_proj\]"):
        Ia3Adapter(experts).attach_to_model(model)
    Ia3Adapter(Ia3Config(target_modules=["k_proj", "v_proj"])).attach_to_model(model)
    assert len(adapter_modules(model)) == 4


def test_public_form() -> None:
    model, adapter = adapted(tiny_llama(), method=Ia3Config, target_modules=["k_proj", "down_proj"])
    public = adapter.to_public_adapter(gathered(model), "tiny/base")
    assert public.config["peft_type"] == "IA3"
    assert public.config["target_modules"] == ["down_proj", "k_proj"]
    assert public.config["feedforward_modules"] == ["down_proj"]
    shapes = {name.split("layers.")[1]: tuple(v.shape) for name, v in public.tensors.items()}
    assert shapes["0.mlp.down_proj.ia3_l"] == (1, 48)
    assert shapes["1.self_attn.k_proj.ia3_l"] == (16, 1)
    with pytest.raises(RuntimeError, match=r"k_proj\.ia3_l is absent"):
        adapter.to_public_adapter({}, "tiny/base")
