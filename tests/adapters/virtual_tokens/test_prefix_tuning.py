"""The prefix encoder, its layout, and what prefix-tuning refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from dist_peft.adapters.virtual_tokens.prefix_tuning import PrefixEncoder
from dist_peft.core.config.run import PrefixConfig
from dist_peft.core.errors import UserError
from dist_peft.model.sample_dropout import DropoutPosition
from tests.support.tiny_models import CONFIGS, save_model
from tests.support.virtual_tokens import METHODS, attach, load, random_ids


def test_mlp_is_that_of_torch() -> None:
    config = PrefixConfig(num_virtual_tokens=3, encoder_hidden_size=5)
    encoder = PrefixEncoder(nn.Embedding(7, 8), 4, 2, config, DropoutPosition(0))
    own = {name: torch.randn(start.shape) for name, start in encoder.starts.items()}
    mlp = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 16))
    names = ("hidden_weight", "hidden_bias", "output_weight", "output_bias")
    for parameter, name in zip(mlp.parameters(), names, strict=True):
        parameter.data = own[name]
    assert torch.equal(encoder.encode_prompt(own), mlp(own["embedding"]))


@pytest.mark.parametrize("projection", [True, False])
def test_number_of_parameters(projection: bool) -> None:
    """The formula of the documentation, with d = 4, H = 4, L = 2, P = 3."""
    config = PrefixConfig(num_virtual_tokens=3, projection=projection)
    encoder = PrefixEncoder(nn.Embedding(7, 8), 4, 2, config, DropoutPosition(0))
    found = sum(p.numel() for p in encoder.parameters())
    assert found == (3 * 4 + 4 * (4 + 1) + 16 * (4 + 1) if projection else 3 * 16)


@torch.no_grad()
def test_direct_prefix_is_every_layers_keys_and_values(tmp_path: Path) -> None:
    """A prefix of what the model itself keeps of three tokens is as good as the tokens."""
    save_model(CONFIGS["llama"], tmp_path)
    plain, model = load(tmp_path), load(tmp_path)
    ids = random_ids(1, 9)
    cache = plain(input_ids=ids[:, :3], use_cache=True).past_key_values
    adapter = attach(PrefixConfig(num_virtual_tokens=3, projection=False), model)
    kept = [states for layer in cache.layers for states in (layer.keys[0], layer.values[0])]
    # [2 layers * 2, heads, P, head size] -> [P, 2 layers * 2 * heads * head size]
    flat = torch.stack(kept).permute(2, 0, 1, 3).flatten(1)
    adapter.encoder.embedding = nn.Parameter(flat)
    found = model(input_ids=ids[:, 3:], use_cache=False).logits
    torch.testing.assert_close(found, plain(input_ids=ids).logits[:, 3:], rtol=0, atol=1e-6)


def test_output_keeps_no_cache_that_nobody_asked_for(tmp_path: Path) -> None:
    save_model(CONFIGS["llama"], tmp_path)
    model = load(tmp_path)
    attach(METHODS["prefix"], model)
    assert model(input_ids=random_ids(1, 4), use_cache=False).past_key_values is None


def model_with(**changes: Any) -> Any:
    config = tf.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = tf.AutoModelForCausalLM.from_config(config)
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_lora_rank": 4}, "the base has kv_lora_rank"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "the base has linear_attention"),
        ({"_attn_implementation_internal": "flex_attention"}, "base.attention flex_attention"),
    ],
)
def test_model_that_does_not_fit(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        attach(METHODS["prefix"], model_with(**changes))
