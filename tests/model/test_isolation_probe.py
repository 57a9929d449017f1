"""Isolation of packed documents in float32, without the model's weights."""

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from dist_peft.app.model_setup import build_model
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.config.run import BaseConfig, RunConfig
from dist_peft.core.errors import UserError
from dist_peft.model import attention_mask as attention
from dist_peft.model import isolation_probe
from dist_peft.model.attention_mask import documents_are_isolated
from dist_peft.model.decoder_blocks import find_decoder_blocks
from dist_peft.model.isolation_probe import (
    is_isolated_beyond_switches,
    is_isolated_in_float32,
    layers_to_run,
    refuse_leaks,
)
from dist_peft.model.meta_device import EmptyOnMeta
from dist_peft.model.rotary import set_rotary_by_document
from dist_peft.model.skeleton import Skeleton, build_skeleton
from tests.support.tiny_models import _GROUPED, CONFIGS, CONVOLUTIONS, MIXTURES, save_model

CPU = torch.device("cpu")


def skeleton_of(config: tf.PretrainedConfig, directory: Path, quant: Any = None) -> Skeleton:
    save_model(config, directory)
    base = BaseConfig(path=str(directory), compute_dtype="bfloat16", quant=quant)
    return build_skeleton(base, directory)


def leak(monkeypatch: pytest.MonkeyPatch, layer: Any, share: float) -> None:
    """Each token gets a share of the token before it, of whatever document: a short convolution."""
    forward: Callable[..., Tensor] = layer.forward

    def leaking(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        before = nn.functional.pad(hidden_states, (0, 0, 1, -1))
        return forward(self, hidden_states + share * before, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", leaking)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "opt", "mixtral"])
@pytest.mark.parametrize("quant", [None, {"kind": "nf4"}], ids=["plain", "nf4"])
def test_holds_and_leaves_the_model_as_it_was(family: str, quant: Any, tmp_path: Path) -> None:
    skeleton = skeleton_of({**CONFIGS, **MIXTURES}[family], tmp_path, quant)
    model = skeleton.model

    def state() -> list[Any]:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        modules = [(name, id(m), sorted(vars(m))) for name, m in model.named_modules()]
        return [*((name, id(t)) for name, t in tensors), *modules]

    before, drawn = state(), torch.random.get_rng_state()
    assert is_isolated_in_float32(model, skeleton.blocks, 64) is True
    assert state() == before and model.config.dtype == torch.bfloat16
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_sees_convolutions(tmp_path: Path) -> None:
    skeleton = skeleton_of(CONVOLUTIONS["lfm2"], tmp_path)
    assert is_isolated_in_float32(skeleton.model, skeleton.blocks) is False


def test_a_leak_that_half_precision_hides_is_refused_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.3 % of the token before: the loaded mixture is allowed more than that for rounding."""
    leak(monkeypatch, MixtralDecoderLayer, 3e-3)
    torch.manual_seed(0)
    config = MIXTURES["mixtral"]
    loaded = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    skeleton = skeleton_of(config, tmp_path)
    monkeypatch.setattr(attention, "FrozenExperts", type(loaded.model.layers[0].mlp.experts))
    assert documents_are_isolated(loaded, CPU)
    monkeypatch.undo()
    leak(monkeypatch, MixtralDecoderLayer, 3e-3)
    assert is_isolated_in_float32(skeleton.model, skeleton.blocks) is False
    run = RunConfig.model_validate(
        {
            "base": {"path": str(tmp_path), "compute_dtype": "bfloat16"},
            "data": {"train": [{"path": "unused.txt"}], "seq_len": 64},
        }
    )
    with pytest.raises(UserError, match=r"mixtral .* see each other .* data\.packing: false"):
        build_model(resolve_config(run), packed_tokens=run.data.seq_len)


def test_a_mask_that_is_not_quite_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention to other documents with weights of about e^-9 each."""

    def open_a_little(sees: Tensor, dtype: torch.dtype) -> Tensor:
        causal = torch.ones_like(sees).tril()
        mask = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, -9.0)
        return mask.masked_fill(~causal, torch.finfo(dtype).min).unsqueeze(1)

    skeleton = skeleton_of(CONFIGS["opt"], tmp_path)
    skeleton.model.config._attn_implementation = "sdpa"  # with a mask
    assert is_isolated_in_float32(skeleton.model, skeleton.blocks) is True
    monkeypatch.setattr(attention, "_to_additive_mask", open_a_little)
    assert is_isolated_in_float32(skeleton.model, skeleton.blocks) is False


def test_lengths_beyond_a_window_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leak that begins with documents longer than the window is no matter of short rows."""
    model = tf.AutoModelForCausalLM.from_config(CONFIGS["mistral"]).eval()
    blocks = find_decoder_blocks(model)
    forward = type(blocks[0]).forward

    def leaking(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if int(kwargs["position_ids"].amax()) >= 8:
            hidden_states = hidden_states + 0.01 * nn.functional.pad(hidden_states, (0, 0, 1, -1))
        found: Tensor = forward(self, hidden_states, *args, **kwargs)
        return found

    monkeypatch.setattr(type(blocks[0]), "forward", leaking)
    assert is_isolated_in_float32(model, blocks, longest=16) is True
    assert is_isolated_in_float32(model, blocks, longest=17) is False


def on_meta(config: tf.PretrainedConfig) -> tf.PreTrainedModel:
    with EmptyOnMeta():
        model = tf.AutoModelForCausalLM.from_config(config).eval()
    set_rotary_by_document(model)
    return model  # type: ignore[no-any-return]


_LLAMA4 = tf.Llama4TextConfig(
    hidden_size=64,
    intermediate_size=32,
    intermediate_size_mlp=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=97,
    num_local_experts=2,
    no_rope_layers=[1, 0],
    attention_chunk_size=10000,
    attn_temperature_tuning=True,
    floor_scale=8192,
)
_LONG = 20000
_LONGROPE = tf.Phi3Config(
    **{k: v for k, v in _GROUPED.items() if k not in ("head_dim", "max_position_embeddings")},
    max_position_embeddings=131072,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 4096,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
    },
)
SWITCHED = {
    "window": tf.MistralConfig(**_GROUPED, sliding_window=4096),
    "mixture": tf.Qwen3MoeConfig(
        **_GROUPED,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        use_sliding_window=True,
        sliding_window=4096,
        max_window_layers=1,
    ),
    "longrope": _LONGROPE,
}


@pytest.mark.parametrize("family", SWITCHED)
def test_lengths_that_are_too_long_to_run_are_tried_shortened(family: str) -> None:
    """In rows beyond a window or an original length of thousands of tokens."""
    model = on_meta(SWITCHED[family])
    before = torch.random.get_rng_state()
    assert is_isolated_beyond_switches(model, _LONG) is True
    assert torch.equal(torch.random.get_rng_state(), before)


def test_sees_scales_that_count_from_the_row_instead_of_the_document() -> None:
    """Llama 4 scales queries by their place in the row, from 8192 on: no matter of short rows."""
    model = on_meta(_LLAMA4)
    blocks = find_decoder_blocks(model)
    assert is_isolated_in_float32(model, blocks, _LONG) is True
    assert is_isolated_beyond_switches(model, _LONG) is False
    refuse_leaks(model, blocks, 8192)
    refuse_leaks(model, blocks, 8200)
    with pytest.raises(UserError) as caught:
        refuse_leaks(model, blocks, 8201)
    assert "floor_scale: 8192 in config.json" in str(caught.value)
    assert "set data.packing: false, or data.seq_len to 8192 at most" in str(caught.value)


def test_sees_angles_of_the_longest_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes those of the longest document of the batch for all."""
    model = on_meta(_LONGROPE)
    monkeypatch.setattr(isolation_probe, "set_rotary_by_document", lambda model: None)
    assert is_isolated_beyond_switches(model, _LONG) is False
    assert is_isolated_beyond_switches(model, 4096) is True


def test_lengths_that_cannot_be_tried_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = on_meta(tf.MistralConfig(**_GROUPED, sliding_window=4096))
    blocks = find_decoder_blocks(model)
    own = type(model).__init__

    def broken(self: nn.Module, config: Any) -> None:
        own(self, config)
        raise RuntimeError("only from its files")

    monkeypatch.setattr(type(model), "__init__", broken)
    assert is_isolated_beyond_switches(model, _LONG) is None
    refuse_leaks(model, blocks, 4104)
    assert "could not be tried" not in caplog.text
    refuse_leaks(model, blocks, 4105)
    assert "rows of more than 4096 tokens (sliding_window: 4096 in config.json)" in caplog.text


def test_numbers_that_are_not_finite_are_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of shortened lengths that overflows says nothing of the real one."""
    model = on_meta(tf.MistralConfig(**_GROUPED, sliding_window=4096))
    layer = type(find_decoder_blocks(model)[0])
    forward: Callable[..., Tensor] = layer.forward

    def overflowing(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if hidden_states.shape[1] > 16:
            hidden_states = hidden_states * float("nan")
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", overflowing)
    assert is_isolated_beyond_switches(model, _LONG) is None


def test_what_cannot_run_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tf.AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    blocks = find_decoder_blocks(model)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("only on a GPU")

    monkeypatch.setattr(blocks[1], "forward", broken)
    assert is_isolated_in_float32(model, blocks) is None


def test_the_first_layers_of_every_kind() -> None:
    kinds = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 3), "c": nn.Linear(3, 2)}

    def run(text: str) -> int:
        return layers_to_run([kinds[letter] for letter in text])

    assert [run(text) for text in ("a", "aaaa", "aabaab", "abcab")] == [1, 2, 3, 3]
    assert layers_to_run([kinds["a"]] * 5, ["full", "full", "full", "sliding", "full"]) == 4


def test_a_large_model_needs_little_memory() -> None:
    """80 layers of hidden 8192, as wide as a model of 70 B parameters: 280 GB in float32."""
    config = tf.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(config)  # buffers are real in a skeleton
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert is_isolated_in_float32(model, find_decoder_blocks(model), 4096) is True
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def test_heads_and_embeddings_are_not_written(tmp_path: Path) -> None:
    """A tied head has the embedding's weight in the model; here its products are its own."""
    config = tf.Qwen3Config(**_GROUPED, tie_word_embeddings=True)
    skeleton = skeleton_of(config, tmp_path)
    assert is_isolated_in_float32(skeleton.model, skeleton.blocks) is True
    assert skeleton.model.lm_head.weight is skeleton.model.get_input_embeddings().weight
