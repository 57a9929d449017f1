import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from torch import nn

from dist_peft.adapters import targets
from dist_peft.adapters.method_table import make_adapter
from dist_peft.adapters.targets import (
    check_pattern_keys,
    list_adapter_targets,
    resolve_pattern_value,
)
from dist_peft.core.config.run import BaseConfig, QaLoraConfig, QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.skeleton import build_skeleton
from tests.support.adapters import frozen_model, tiny_llama
from tests.support.tiny_models import CONFIGS, save_model

LINEARS = [
    f"model.layers.{layer}.{name}"
    for layer in range(2)
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
]


@pytest.mark.parametrize(("family", "adapts_head"), [("llama", True), ("qwen3", False)])
def test_of_packed_ends_an_untied_head_can_be_adapted(
    family: str, adapts_head: bool, tmp_path: Path
) -> None:
    save_model(CONFIGS[family], tmp_path)
    quant = QuantConfig(kind="int", group_size=16, embeddings=True)
    model = build_skeleton(BaseConfig(path=str(tmp_path), quant=quant), tmp_path).model
    assert not {"lm_head", "model.embed_tokens"} & {*list_adapter_targets("all-linear", model)}
    with pytest.raises(UserError, match=r"embed_tokens is not a quantizable linear"):
        list_adapter_targets(["embed_tokens"], model)
    if adapts_head:
        assert list_adapter_targets(["lm_head"], model) == ["lm_head"]
        config = QaLoraConfig(target_modules=["lm_head"])
        adapter = make_adapter(config, seed=0, arithmetic=torch.float32)
        with pytest.raises(UserError, match="lm_head is the output head"):
            adapter.attach_to_model(model)
    else:
        with pytest.raises(UserError, match="an output head tied to it cannot be"):
            list_adapter_targets(["lm_head"], model)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return frozen_model(tiny_llama())


def test_all_linear_leaves_out_the_head(model: nn.Module) -> None:
    assert list_adapter_targets("all-linear", model) == LINEARS


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], [n for n in LINEARS if n.endswith("q_proj")]),
        (["mlp.up_proj", "q_proj"], [n for n in LINEARS if n.endswith(("q_proj", "up_proj"))]),
        (["model.layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        ([r".*layers\.0\..*(q|v)_proj"], [LINEARS[0], LINEARS[2]]),
        (["lm_head"], ["lm_head"]),
        (["q_proj", ".*q_proj"], [n for n in LINEARS if n.endswith("q_proj")]),
    ],
)
def test_lists(model: nn.Module, targets: list[str], expected: list[str]) -> None:
    assert list_adapter_targets(targets, model) == expected


@pytest.mark.parametrize("entry", ["roj", "proj", "_proj", "layers.0"])
def test_a_part_of_a_component_is_no_ending(model: nn.Module, entry: str) -> None:
    with pytest.raises(UserError, match=f"{re.escape(repr(entry))} matches no linear"):
        list_adapter_targets([entry], model)


def test_unknown_target_names_the_nearest_and_all(model: nn.Module) -> None:
    with pytest.raises(UserError) as caught:
        list_adapter_targets(["k_proj", "q_porj"], model)
    assert str(caught.value) == (
        "adapter.target_modules entry 'q_porj' matches no linear; did you mean q_proj? There are: "
        "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    )


def test_embedding_as_target_points_to_its_own_key(model: nn.Module) -> None:
    with pytest.raises(UserError, match=r"model\.embed_tokens is not .*adapter\.embeddings: true"):
        list_adapter_targets(["embed_tokens"], model)


def test_broken_expression(model: nn.Module) -> None:
    with pytest.raises(UserError, match=r"'\*proj' is neither a module's name nor a regular"):
        list_adapter_targets(["*proj"], model)


def test_linears_that_no_gradient_reaches(model: nn.Module) -> None:
    linears = [m for m in model.modules() if isinstance(m, FrozenLinear)]
    before = [linear.without_gradient for linear in linears]
    for linear in linears:
        linear.without_gradient = True
    try:
        with pytest.raises(UserError, match="all-linear: no gradient reaches a linear of the"):
            list_adapter_targets("all-linear", model)
    finally:
        for linear, own in zip(linears, before, strict=True):
            linear.without_gradient = own


def test_model_without_linears() -> None:
    with pytest.raises(UserError, match="all-linear: the model has no linear"):
        list_adapter_targets("all-linear", nn.Sequential(nn.Embedding(2, 2)))


KEYS = st.sampled_from(
    ["q_proj", "self_attn.q_proj", r"layers\.0\..*", "proj", ".*", "model", r"(q|k)_proj", "x|y"]
)


@given(st.lists(KEYS, unique=True), st.sampled_from([*LINEARS, "x", "a.y", "q_proj"]))
def test_patterns_follow_peft(keys: list[str], name: str) -> None:
    pattern = {key: i + 1 for i, key in enumerate(keys)}
    assert resolve_pattern_value(pattern, name, 0) == pattern.get(get_pattern_key(keys, name), 0)


def test_pattern_that_matches_nothing() -> None:
    with pytest.raises(UserError, match=r"rank_pattern\['q_porj'\] matches no .* mean q_proj\?"):
        check_pattern_keys("rank_pattern", {"q_porj": 4}, LINEARS)


def test_broken_pattern() -> None:
    with pytest.raises(UserError, match=r"rank_pattern\['\('\] is no regular expression"):
        check_pattern_keys("rank_pattern", {"(": 4}, LINEARS)


SLOW = "(.*.*.*.*.*.*.*.*.*.*.*.*)*x"


def test_pattern_that_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_MATCHING_CPU_SECONDS", 1)
    with pytest.raises(UserError, match=r"adapter.target_modules entry .* takes too long on names"):
        list_adapter_targets([SLOW], frozen_model(tiny_llama()))
    with pytest.raises(UserError, match=r"adapter.rank_pattern entry .* takes too long on names"):
        check_pattern_keys("rank_pattern", [SLOW], LINEARS)
    check_pattern_keys("rank_pattern", [r".*layers\.[01]\..*_proj"], LINEARS)
