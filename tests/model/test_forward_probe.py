"""What a family's code does with packed linears is seen before anything is loaded."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.models.llama import modeling_llama as llama

from dist_peft.adapters.targets import list_adapter_targets
from dist_peft.core.config.run import BaseConfig, QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.model import forward_probe, weight_probe
from dist_peft.model.forward_probe import probe_forward
from dist_peft.model.freezing import FrozenReplacement
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.skeleton import Skeleton, build_skeleton
from tests.support.tiny_models import _COMMON, CONFIGS, MIXTURES, save_model


def build(directory: Path, **quant: Any) -> Skeleton:
    base = BaseConfig(path=str(directory), quant=QuantConfig(**quant), compute_dtype="float32")
    return build_skeleton(base, directory)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    save_model(CONFIGS["llama"], directory)
    return directory


def packed(model: nn.Module) -> set[str]:
    """Names of packed linears of layers, without the layer."""
    names = (n for n, m in model.named_modules() if isinstance(m, FrozenLinear) and not m.is_head)
    return {name.split(".", 3)[3] for name in names}


ALL = {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}


def read_through_a_variable(self: Any, x: Tensor) -> Tensor:
    last = self.down_proj
    y: Tensor = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
    return last(y.to(last.weight.dtype))


def read_two_weights(self: Any, x: Tensor) -> Tensor:
    for linear in (self.gate_proj, self.up_proj):
        x = x.to(linear.weight.dtype)
    return self.down_proj(self.gate_proj(x) * self.up_proj(x))


def read_in_a_function(self: Any, x: Tensor) -> Tensor:
    def fused(x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.linear(x, weight)

    return fused(self.up_proj(x), getattr(self.down_proj, "weight"))  # noqa: B009


@pytest.mark.parametrize(
    ("forward", "plain"),
    [
        (read_through_a_variable, {"mlp.down_proj"}),
        (read_two_weights, {"mlp.gate_proj", "mlp.up_proj"}),
        (read_in_a_function, {"mlp.down_proj"}),
    ],
)
def test_linears_that_code_reads_stay_plain(
    forward: Callable[..., Tensor],
    plain: set[str],
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(llama.LlamaMLP, "forward", forward)
    with caplog.at_level(logging.INFO):
        model = build(base).model
    assert packed(model) == ALL - plain
    for name in plain:
        assert f"model.layers.*.{name} stays plain" in caplog.text
        kept = [m for n, m in model.named_modules() if n.endswith(name)]
        assert len(kept) == 2 and all(type(m) is nn.Linear for m in kept)
        assert all(m.checkpoint_names for m in kept)  # are loaded like any parameter


def wants_a_linear(self: Any, x: Tensor) -> Tensor:
    if not isinstance(self.up_proj, nn.Linear):
        raise TypeError("up_proj is no Linear")
    return self.down_proj(self.up_proj(x))


def changes_weights(self: Any, x: Tensor) -> Tensor:
    self.weight.div_(2)
    return x * self.weight


@pytest.mark.parametrize(
    ("owner", "forward", "cause"),
    [
        (
            llama.LlamaMLP,
            wants_a_linear,
            r"TypeError: up_proj is no Linear \(test_forward_probe.py",
        ),
        (llama.LlamaRMSNorm, changes_weights, "changes 5 of its weights in place"),
    ],
)
def test_refused_with_the_cause(
    owner: Any, forward: Any, cause: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "forward", forward)
    with pytest.raises(UserError, match=f"'llama' is not supported: .*{cause}"):
        build(base)


def test_rwkv_changes_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is refused by name; without the name the probe sees it."""
    monkeypatch.setattr(weight_probe, "_REFUSED", {})
    config = tf.RwkvConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, context_length=64, rescale_every=1
    )
    save_model(config, tmp_path)
    with pytest.raises(UserError, match=r"'rwkv' is not supported: .*weights in place"):
        build(tmp_path)


def asks_for_values(self: Any, x: Tensor) -> Tensor:
    if x.abs().sum().item() > 1e9:
        return x
    chosen = x.flatten(0, -2).sum(-1).nonzero()
    assert chosen.numel()
    return self.down_proj(self.up_proj(x))


def test_what_asks_for_values_is_not_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(llama.LlamaMLP, "forward", asks_for_values)
    with caplog.at_level(logging.DEBUG):
        assert packed(build(base).model) == ALL
    assert "cannot be tried without weights" in caplog.text


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_nothing_is_left_behind(family: str, tmp_path: Path) -> None:
    save_model({**CONFIGS, **MIXTURES}[family], tmp_path)
    skeleton = build(tmp_path)
    model = skeleton.model

    def state() -> dict[str, Any]:
        tables = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        own = {n: {k: id(v) for k, v in m.__dict__.items()} for n, m in model.named_modules()}
        return {"tensors": {n: id(t) for n, t in tables.items()}, "own": own}

    before = state()
    replaced: list[FrozenReplacement] = []
    probe_forward(model, skeleton.blocks, replaced, "base")
    assert state() == before
    assert all(type(b) is Tensor and b.device.type == "cpu" for b in model.buffers())


def test_a_model_that_is_built_again_is_not_run_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere on the disk or packed otherwise it is the same one; with other code or another
    config it is not."""
    first = build(base).model
    runs = mock.Mock(wraps=forward_probe._run_forward)
    monkeypatch.setattr(forward_probe, "_run_forward", runs)
    save_model(CONFIGS["llama"], tmp_path / "elsewhere")
    again = build(tmp_path / "elsewhere").model
    assert runs.call_count == 0
    build(base, kind="int", bits=3, group_size=16)
    assert runs.call_count == 0
    assert packed(again) == packed(first) == ALL
    assert vars(again)["head_output_is_logits"] is vars(first)["head_output_is_logits"] is True
    changed = copy.deepcopy(CONFIGS["llama"])
    changed.rms_norm_eps = 0.5
    save_model(changed, tmp_path / "changed")
    build(tmp_path / "changed")
    assert runs.call_count == 2  # with a graph, and with documents for a mask
    monkeypatch.setattr(llama.LlamaMLP, "forward", only_picks)
    assert any(
        m.without_gradient for m in build(base).model.modules() if isinstance(m, FrozenLinear)
    )
    assert runs.call_count > 2


def test_of_blocks_that_are_alike_one_is_run(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, ran = llama.LlamaMLP.forward, list[nn.Module]()

    def note_and_forward(self: Any, x: Tensor) -> Tensor:
        ran.append(self)
        return forward(self, x)

    monkeypatch.setattr(llama.LlamaMLP, "forward", note_and_forward)
    blocks = build(base).blocks
    assert len(blocks) == 2
    assert ran == [blocks[0].mlp] * 2  # with a graph, and with documents for a mask


def only_picks(self: Any, x: Tensor) -> Tensor:
    best = self.gate_proj(x).argmax(-1, keepdim=True)
    return self.down_proj(self.up_proj(x)) * (best > 0)


def test_what_gets_no_gradient_is_left_out_of_all_linear(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(llama.LlamaMLP, "forward", only_picks)
    model = build(base).model
    with caplog.at_level(logging.INFO):
        chosen = list_adapter_targets("all-linear", model)
    assert {name.split(".", 3)[3] for name in chosen} == ALL - {"mlp.gate_proj"}
    assert "leaves out model.layers.*.mlp.gate_proj: no gradient reaches" in caplog.text
    assert len(list_adapter_targets(["gate_proj"], model)) == 2  # who names it gets it


def test_layers_that_are_run_without_a_graph_first(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HRM's are, several times, and then with one."""
    forward = llama.LlamaModel.forward

    def run_twice(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            forward(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(llama.LlamaModel, "forward", run_twice)
    assert len(list_adapter_targets("all-linear", build(base).model)) == 2 * len(ALL)


@pytest.mark.parametrize("in_place", [False, True])
def test_logits_that_are_changed_after_the_head(
    in_place: bool, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place, as Chameleon masks the tokens of images, they are still the head's output."""
    forward = llama.LlamaForCausalLM.forward

    def mask(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = forward(self, *args, **kwargs)
        if in_place:
            found.logits[:, :, 3:5] = -100.0
        return found

    monkeypatch.setattr(llama.LlamaForCausalLM, "forward", mask)
    assert vars(build(base).model)["head_output_is_logits"] is not in_place


def test_indexers_are_left_out_of_all_linear(tmp_path: Path) -> None:
    """DSA's indexer gives the numbers of the tokens that are seen, which are no function to
    differentiate."""
    config = tf.DeepseekV32Config(
        **_COMMON,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        index_n_heads=2,
        index_head_dim=32,
        index_topk=8,
    )
    save_model(config, tmp_path)
    model = build(tmp_path).model
    left = {n for n, m in model.named_modules() if isinstance(m, FrozenLinear)}
    left -= {*list_adapter_targets("all-linear", model), "lm_head"}
    assert {name.split(".", 3)[3] for name in left} == {
        "self_attn.indexer.wq_b",
        "self_attn.indexer.wk",
    }


def test_encoder_decoder_attention_is_left_out(tmp_path: Path) -> None:
    """Of a decoder alone it is never run."""
    config = tf.BartConfig(
        vocab_size=97,
        d_model=64,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=104,
        encoder_layers=1,
        max_position_embeddings=64,
        is_decoder=True,
        is_encoder_decoder=False,
    )
    save_model(config, tmp_path)
    model = build(tmp_path).model
    chosen = list_adapter_targets("all-linear", model)
    assert chosen and not any("encoder_attn" in name for name in chosen)
    assert any("self_attn.k_proj" in name for name in chosen)


def test_a_shared_bias_without_a_tensor_is_refused(tmp_path: Path) -> None:
    """Two modules have one bias in transformers; of a packed head it would be another."""
    sizes = {**_COMMON, "is_decoder": True}
    save_model(tf.BertGenerationConfig(**sizes), tmp_path)
    with pytest.raises(UserError, match="bias has no tensor of its own"):
        build(tmp_path)
