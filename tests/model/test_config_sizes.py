"""Impossible sizes name their key; a tokenizer fits the embedding or is another model's."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import Gemma4TextConfig, GPT2Config, PreTrainedTokenizerFast

from dist_peft.core.errors import UserError
from dist_peft.model.config_sizes import (
    list_layer_values,
    refuse_foreign_tokenizer,
    refuse_impossible_sizes,
)

FILE = Path("base/config.json")


@pytest.mark.parametrize(
    ("described", "named"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"n_head": -1}, "n_head -1"),
        ({"text_config": {"head_dim": 0}}, "head_dim 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000"),
        ({"num_local_experts": 2**20}, "num_local_experts 1048576"),
    ],
)
def test_impossible_size(described: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=rf"base/config\.json says {named}, which no model has"):
        refuse_impossible_sizes(described, FILE)


def test_possible_sizes() -> None:
    refuse_impossible_sizes({"num_experts": 0, "head_dim": None, "n_head": "8"}, FILE)
    refuse_impossible_sizes(GPT2Config(), FILE)
    refuse_impossible_sizes({"head_dim": 0, "qk_nope_head_dim": 256}, FILE)  # GLM-5 Next
    with pytest.raises(UserError, match="hidden_size 0"):
        refuse_impossible_sizes(GPT2Config(n_embd=0), FILE)


def test_sizes_that_differ_by_layer() -> None:
    """Gemma 4 has other heads in its layers of full attention; the model has no one size."""
    config = Gemma4TextConfig(num_hidden_layers=4, head_dim=8, global_head_dim=16)
    assert sorted(set(list_layer_values(config, "head_dim"))) == [8, 16]
    assert list_layer_values(config, "hidden_size") == [config.hidden_size]
    assert list_layer_values(config, "no_such_key") == [None]
    refuse_impossible_sizes(config, FILE)
    config = Gemma4TextConfig(num_hidden_layers=4, head_dim=8, global_head_dim=0)
    with pytest.raises(UserError, match="says head_dim 0, which no model has"):
        refuse_impossible_sizes(config, FILE)


def make_tokenizer(ids: dict[str, int], *added: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel(ids, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="a")
    tokenizer.add_tokens(list(added))
    return tokenizer


def test_tokenizer_of_another_model() -> None:
    small = make_tokenizer({"a": 0, "b": 1}, "<image>")
    for rows in (2, 3, 64):  # the embedding may be larger, and an added token beyond
        refuse_foreign_tokenizer(small, rows, FILE.parent)
    with pytest.raises(
        UserError, match=r"tokenizer of base has 2 tokens with ids up to 1 \('b'\).* for 1 "
    ):
        refuse_foreign_tokenizer(small, 1, FILE.parent)
    with pytest.raises(UserError, match=r"ids up to 70 \('b'\)"):
        refuse_foreign_tokenizer(make_tokenizer({"a": 0, "b": 70}), 64, FILE.parent)
