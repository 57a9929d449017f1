"""Layers of the decoder are found among lists of other modules."""

import pytest
import torch
import transformers as tf
from torch import nn

from dist_peft.core.errors import UserError
from dist_peft.model.decoder_blocks import find_decoder_blocks
from dist_peft.model.model_class import choose_auto_class


def test_blocks_may_be_of_several_classes() -> None:
    """Jamba's layers are of two, and the list of them is taken."""
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(
            tf.JambaConfig(hidden_size=64, num_hidden_layers=8, num_experts=2, vocab_size=97)
        )
    blocks = find_decoder_blocks(model)
    assert len(blocks) == 8
    assert {type(block).__name__ for block in blocks} == {
        "JambaAttentionDecoderLayer",
        "JambaMambaDecoderLayer",
    }


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (
            tf.ChameleonConfig(
                hidden_size=64,
                num_hidden_layers=2,
                vocab_size=97,
                vocabulary_map={"<image>": 96, "IMGIMGAZ": 95},
                vq_config={"base_channels": 32},
            ),
            "model.layers",
        ),
        (
            tf.GitConfig(
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                vocab_size=97,
                vision_config={"num_hidden_layers": 5},
            ),
            "git.encoder.layer",
        ),
    ],
    ids=["chameleon", "git"],
)
def test_blocks_next_to_a_tower_that_is_larger(config: tf.PretrainedConfig, layers: str) -> None:
    auto = choose_auto_class({"model_type": config.model_type})
    with torch.device("meta"):
        model = auto.from_config(config)
    assert find_decoder_blocks(model) == list(model.get_submodule(layers))


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    with pytest.raises(UserError, match="no list of decoder layers found in Sequential"):
        find_decoder_blocks(nn.Sequential(nn.Linear(2, 2)))
