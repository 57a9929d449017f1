import math
from typing import Any

import pytest
import torch
from torch import nn

from dist_peft.adapters.lora.embedding import LoraEmbedding
from dist_peft.adapters.lora.layer import LoraLinear
from dist_peft.adapters.method_table import make_adapter
from dist_peft.core.config.run import LoraConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.adapter_module import AdapterModule
from tests.support.adapters import (
    adapted,
    adapter_modules,
    disturb,
    fill,
    frozen_model,
    gathered,
    ids,
    int_codec,
    tiny_llama,
)


def attach(model: nn.Module, **settings: Any) -> Any:
    adapter = make_adapter(LoraConfig(**settings), seed=0, arithmetic=torch.float32)
    adapter.attach_to_model(model)
    return adapter


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"embeddings": True}])
@pytest.mark.parametrize("tied", [False, True])
def test_an_untrained_adapter_changes_nothing(settings: dict[str, Any], tied: bool) -> None:
    original = tiny_llama(tied, bias=True)
    model, _ = adapted(original, int_codec(4), **settings)
    bare = frozen_model(original, int_codec(4))
    assert torch.equal(model(ids()).logits, bare(ids()).logits)


def test_only_the_adapter_learns() -> None:
    model, _ = adapted(tiny_llama(), embeddings=True, use_dora=False, r=4)
    disturb(model)
    model(ids()).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("lora_" in name), (
            name
        )


def test_zeros_that_stay() -> None:
    """The layer is the base where it is zero, and elsewhere LoRA; counted over all ranks."""
    original = tiny_llama()
    with torch.no_grad():
        for layer in original.model.layers:
            weight = layer.self_attn.q_proj.weight
            weight[weight.abs() < weight.abs().median()] = 0
    settings: dict[str, Any] = {"target_modules": ["q_proj"], "r": 4}
    model, adapter = adapted(original, keep_zeros=True, **settings)
    plain, _ = adapted(original, **settings)
    for either in (model, plain):
        disturb(either)
    layer = adapter_modules(model)["model.layers.1.self_attn.q_proj"]
    weight = original.model.layers[1].self_attn.q_proj.weight
    unit = torch.eye(weight.shape[1])
    change, dense = (
        (adapter_modules(each)["model.layers.1.self_attn.q_proj"](unit).T - weight)
        for each in (model, plain)
    )
    torch.testing.assert_close(change, dense.masked_fill(weight == 0, 0))
    for path, own in adapter.layers.items():  # as the loader does
        rows = original.get_submodule(path).weight
        own.prepare_base_rows(rows, Span(0, len(rows)), lambda value: value)
    assert layer.num_zeros == int((weight == 0).sum()) >= weight.numel() // 2 - 1
    adapter.plan_steps(3)
    for other in adapter.layers.values():
        other.num_zeros = 0
    with pytest.raises(UserError, match="no weight of the 2 adapted linears is zero"):
        adapter.plan_steps(3)
    limits = adapter.get_export_limits(tied=False)
    assert limits.merged is None and "PEFT would apply the whole" in str(limits.separate)
    assert limits.adapter == limits.separate
    public = adapter.to_public_adapter(gathered(model), "tiny/base")
    assert public.config["peft_type"] == "MASKED_LORA"


def test_structure() -> None:
    model = frozen_model(tiny_llama())
    attach(model, target_modules=["q_proj"], embeddings=True)
    modules = adapter_modules(model)
    assert list(modules) == [
        "model.embed_tokens",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert all(isinstance(m, AdapterModule) for m in modules.values())
    assert isinstance(modules["model.embed_tokens"], LoraEmbedding)
    assert isinstance(modules["model.layers.0.self_attn.q_proj"], LoraLinear)
    own = [p for m in modules.values() for p in m.parameters(recurse=False)]
    assert all(p.is_meta and p.dtype == torch.float32 for p in own)


def test_a_tied_head_keeps_the_base_weight() -> None:
    original = tiny_llama(tied=True)
    model, _ = adapted(original, embeddings=True, target_modules=["q_proj"])
    assert model.lm_head.weight is model.model.embed_tokens.base.weight
    assert model.get_input_embeddings().weight is model.lm_head.weight
    hidden = model.model(ids()).last_hidden_state
    logits = nn.functional.linear(hidden, original.model.embed_tokens.weight)
    torch.testing.assert_close(model(ids()).logits, logits)


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_scalings(rslora: bool) -> None:
    model = frozen_model(tiny_llama())
    attach(
        model,
        r=4,
        alpha=6,
        use_rslora=rslora,
        rank_pattern={"q_proj": 2, r"layers\.1\..*": 3},
        alpha_pattern={"mlp.up_proj": 10.0},
    )
    root = math.sqrt if rslora else float
    expected = {
        "model.layers.0.self_attn.q_proj": (2, 6 / root(2)),
        "model.layers.1.self_attn.q_proj": (2, 6 / root(2)),
        "model.layers.1.self_attn.k_proj": (3, 6 / root(3)),
        "model.layers.0.mlp.up_proj": (4, 10 / root(4)),
        "model.layers.0.mlp.gate_proj": (4, 6 / root(4)),
    }
    for path, (r, scaling) in expected.items():
        layer = model.get_submodule(path)
        assert layer.spec.r == layer.lora_A.shape[0] == layer.lora_B.shape[1] == r
        assert layer.spec.scaling == pytest.approx(scaling)


def test_lora_plus() -> None:
    adapter = attach(frozen_model(tiny_llama()), lr_ratio=16.0, use_dora=True)
    assert adapter.get_lr_scale("model.layers.0.self_attn.q_proj.lora_B") == 16.0
    for name in ("lora_A", "magnitude", "lora_embedding_B"):
        assert adapter.get_lr_scale(f"model.layers.0.self_attn.q_proj.{name}") == 1.0


def test_dropout_follows_the_samples() -> None:
    model, adapter = adapted(tiny_llama(), dropout=0.5, r=4)
    disturb(model)
    assert not model.training  # the base computes without dropout, the adapter with
    both, x = {}, ids(3)
    adapter.begin_micro_batch(2, torch.tensor([7, 8, 9]))
    both["together"] = model(x).logits
    adapter.begin_micro_batch(2, torch.tensor([8]))
    torch.testing.assert_close(model(x[1:2]).logits, both["together"][1:2], rtol=1e-4, atol=1e-4)
    adapter.begin_micro_batch(3, torch.tensor([7, 8, 9]))
    assert not torch.allclose(model(x).logits, both["together"], atol=1e-2)
    model.eval()
    assert torch.equal(model(x).logits, model(x).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_porj"]}, "did you mean q_proj"),
        ({"rank_pattern": {"w_proj": 2}}, r"rank_pattern\['w_proj'\] matches no adapted module"),
        ({"alpha_pattern": {"x(": 1}}, r"alpha_pattern\['x\('\] is no regular expression"),
        ({"embeddings": True, "use_dora": True}, "use_dora cannot be combined"),
        ({"init": "loftq"}, "q_proj is not quantized; set base.quant"),
        ({"init": "pissa", "r": 17}, r"rank of at most 16 in .*k_proj \[16, 32\], not 17"),
    ],
)
def test_what_does_not_fit(settings: dict[str, Any], message: str) -> None:
    model = frozen_model(tiny_llama())
    with pytest.raises(UserError, match=message):
        attach(model, **settings)
    assert not adapter_modules(model)  # nothing was wrapped


def test_embedding_that_cannot_be_adapted() -> None:
    model = frozen_model(tiny_llama())
    model.set_input_embeddings(nn.Identity())
    with pytest.raises(UserError, match="the input embedding is a Identity"):
        attach(model, embeddings=True)


@pytest.mark.parametrize("iterations", [1, 3])
def test_resume(iterations: int) -> None:
    original = tiny_llama()
    settings = {"init": "loftq", "init_iterations": iterations, "r": 4, "embeddings": True}
    first, adapter = adapted(original, int_codec(2), **settings)
    names = adapter.list_init_factors()
    state = {name: value for name, value in gathered(first).items() if name in names}
    assert len(state) == len(names) == 14 * (2 if iterations == 1 else 4)

    second = frozen_model(original, int_codec(2))
    again = make_adapter(LoraConfig(**settings), seed=99, arithmetic=torch.float32)
    again.attach_to_model(second)
    again.set_init_factors(state)
    fill(second, original, ranks=2)
    assert second.state_dict().keys() == first.state_dict().keys()
    for name, value in second.state_dict().items():
        if not name.startswith("model.embed_tokens.lora"):
            assert torch.equal(value, first.state_dict()[name]), name


def test_resume_with_another_start() -> None:
    adapter = attach(frozen_model(tiny_llama(), int_codec(4)), init="pissa", r=4)
    with pytest.raises(
        UserError, match=r"q_proj\.start_A is absent, not \[4, 32\]; it was written"
    ):
        adapter.set_init_factors({})
    wrong = {"model.layers.0.self_attn.q_proj.start_A": torch.zeros(2, 32)}
    with pytest.raises(UserError, match=r"start_A has shape \[2, 32\], not \[4, 32\]"):
        adapter.set_init_factors(wrong)


def test_plain_lora_has_no_start_state() -> None:
    adapter = attach(frozen_model(tiny_llama()), use_dora=True)
    assert adapter.list_init_factors() == ()
    adapter.set_init_factors({})


@pytest.mark.parametrize("damage", ["absent", "empty", "cut"])
def test_ungathered_parameters_are_refused(damage: str) -> None:
    model, adapter = adapted(tiny_llama(), r=4)
    tensors, name = gathered(model), "model.layers.1.mlp.up_proj.lora_B"
    if damage == "absent":
        del tensors[name]
    else:
        tensors[name] = tensors[name][: 0 if damage == "empty" else 3]
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.up_proj\.lora_B .*expected \[48, 4\]"):
        adapter.to_public_adapter(tensors, "base")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, ["q_proj", "v_proj"]),
        ({"target_modules": ["q_proj"], "embeddings": True}, ["embed_tokens", "q_proj"]),
        ({"target_modules": [r".*1.*\.q_proj"]}, ["model.layers.1.self_attn.q_proj"]),
    ],
)
def test_public_targets_are_short_but_exact(settings: dict[str, Any], expected: list[str]) -> None:
    model, adapter = adapted(tiny_llama(), r=2, **settings)
    assert adapter.to_public_adapter(gathered(model), "base").config["target_modules"] == expected
