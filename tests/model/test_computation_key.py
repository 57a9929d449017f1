import torch

from dist_peft.core.config.run import QuantConfig
from dist_peft.model.computation_key import describe_computation
from dist_peft.quant.codec import make_codec
from tests.support.adapters import freeze, tiny_llama


def test_equal_for_models_that_differ_in_the_codec_alone() -> None:
    keys = []
    for bits, heads in ((4, 4), (8, 4), (4, 2)):
        model = tiny_llama()
        codec = make_codec(QuantConfig(kind="int", bits=bits, group_size=16), torch.float32)
        attention = model.model.layers[0].self_attn
        attention.q_proj = freeze(attention.q_proj, codec)
        model.config.num_attention_heads = heads
        keys.append(describe_computation(model))
    assert hash(keys[0]) == hash(keys[1]) and keys[0] == keys[1] != keys[2]


def test_another_for_another_linear() -> None:
    plain, frozen = tiny_llama(), tiny_llama()
    attention = frozen.model.layers[1].self_attn
    attention.q_proj = freeze(attention.q_proj)
    assert describe_computation(plain) == describe_computation(tiny_llama())
    assert describe_computation(plain) != describe_computation(frozen)
