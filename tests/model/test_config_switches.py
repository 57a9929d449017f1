"""``model.config_switches``: the lengths that configurations name, and shorter ones."""

from typing import Any

import pytest
import transformers as tf

from dist_peft.model.config_switches import list_switches, shorten_switches

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
}
CONFIGS: dict[str, tuple[Any, list[tuple[str, int]]]] = {
    "window": (tf.MistralConfig(sliding_window=4096), [("sliding_window", 4096)]),
    "none": (tf.LlamaConfig(), []),
    "chunks": (
        tf.Llama4TextConfig(attention_chunk_size=8192, floor_scale=9000),
        [("attention_chunk_size", 8192), ("floor_scale", 9000)],
    ),
    "sparse": (tf.DeepseekV32Config(index_topk=2048), [("index_topk", 2048)]),
    "longrope": (
        tf.Phi3Config(
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=131072,
            sliding_window=2047,
            rope_parameters=LONGROPE,
            pad_token_id=0,
        ),
        [("sliding_window", 2047), *[("original_max_position_embeddings", 4096)] * 2],
    ),
    "dynamic": (
        tf.LlamaConfig(
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        ),
        [("max_position_embeddings", 4096)],
    ),
    "yarn": (
        tf.LlamaConfig(
            rope_parameters={
                "rope_type": "yarn",
                "factor": 2.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 1024,
            },
        ),
        [],
    ),
    "scaled": (tf.Ministral3Config(), [("original_max_position_embeddings", 16384)]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_lengths_are_found_and_shortened_in_order(name: str) -> None:
    config, expected = CONFIGS[name]
    before = config.to_dict()
    assert [(switch.key, switch.length) for switch in list_switches(config)] == expected
    short, lengths = shorten_switches(config, 10**6)
    assert config.to_dict() == before
    assert lengths == sorted(set(lengths)) and all(length <= 48 for length in lengths)
    assert sorted({switch.length for switch in list_switches(short)}) == lengths
    assert type(short) is type(config) and short.hidden_size == config.hidden_size


def test_ratio_from_which_angles_are_computed_is_kept() -> None:
    config = CONFIGS["longrope"][0]
    short, lengths = shorten_switches(config, 10**6)
    assert lengths == [24, 32] and short.original_max_position_embeddings == 32
    assert short.max_position_embeddings / 32 == pytest.approx(131072 / 4096)


def test_longer_and_shorter_ones_stay() -> None:
    config = CONFIGS["longrope"][0]
    short, lengths = shorten_switches(config, 4095)
    assert lengths == [24] and short.max_position_embeddings == 131072
    assert list_switches(short)[-1].length == 4096
    assert shorten_switches(tf.MistralConfig(sliding_window=6), 100)[1] == [6]
    assert shorten_switches(config, 100)[1] == []


def test_lists_of_lengths() -> None:
    config = tf.LlamaConfig()
    config.sliding_window = [4096, None, 512, 4096]  # not every family has one number
    assert [switch.length for switch in list_switches(config)] == [512, 4096]
    short, lengths = shorten_switches(config, 10**6)
    assert short.sliding_window == [32, None, 24, 32] and lengths == [24, 32]
