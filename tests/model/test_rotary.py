"""Documents on both sides of a switch of rotary angles: each as alone, in any company and order."""

import pytest
import torch
import transformers as tf
from torch import Tensor

from dist_peft.model.attention_mask import documents_are_isolated
from dist_peft.model.rotary import (
    compute_document_lengths,
    list_switch_lengths,
    set_rotary_by_document,
)
from tests.support.tiny_models import CONFIGS

CPU = torch.device("cpu")
SWITCH = 16
FAMILIES = ("longrope", "dynamic", "by layer type")
LENGTHS = ([24, 5], [5, 24], [16, 17], [3, 20, 30, 4])


def config_of(family: str) -> tf.PretrainedConfig:
    kinds = {
        "longrope": {
            "rope_type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [1.0 + 2 * i for i in range(8)],
            "original_max_position_embeddings": SWITCH,
        },
        "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    }
    if family == "by layer type":
        kinds[family] = {
            "full_attention": {"rope_theta": 10000.0, **kinds["dynamic"]},
            "sliding_attention": {"rope_theta": 1000.0, "rope_type": "default"},
        }
        base = CONFIGS["gemma3"].to_dict() | {
            "max_position_embeddings": SWITCH,
            "attn_implementation": "eager",
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": kinds[family],
        }
        return tf.Gemma3TextConfig(**base)
    base = CONFIGS["phi3" if family == "longrope" else "llama"].to_dict()
    size = 4 * SWITCH if family == "longrope" else SWITCH
    base |= {"max_position_embeddings": size, "attn_implementation": "eager"}
    base |= {"rope_scaling": None, "rope_parameters": {"rope_theta": 10000.0, **kinds[family]}}
    if family == "longrope":
        base["original_max_position_embeddings"] = SWITCH
    return (tf.Phi3Config if family == "longrope" else tf.LlamaConfig)(**base)


def model_of(family: str) -> tf.PreTrainedModel:
    """Random, with large weights: angles must matter."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config_of(family)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.2)
            assert parameter.isfinite().all(), name
    return model


@torch.no_grad()
def logits(model: tf.PreTrainedModel, ids: Tensor, positions: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_packed_document_is_computed_as_alone(family: str, lengths: list[int]) -> None:
    model = model_of(family)
    ids = torch.randint(3, 97, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    parts = ids.split(lengths, 1)
    # a fresh model for each document: dynamic NTK keeps state
    alone = [logits(model_of(family), p, torch.arange(p.shape[1])[None]) for p in parts]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    wrong = (logits(model_of(family), ids, positions) - torch.cat(alone)).abs().max()
    set_rotary_by_document(model)
    for _ in range(2):
        found = logits(model, ids, positions)
        error = (found - torch.cat(alone)).abs().max() / torch.cat(alone).abs().max()
        print(f"off by {error:.1e}; transformers' own: {wrong:.1e}")
        assert error < 1e-5 and wrong > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_sees_angles_of_another_length(family: str) -> None:
    model = model_of(family)
    assert list_switch_lengths(model.config) == [SWITCH]
    assert not documents_are_isolated(model, CPU, longest=64)
    set_rotary_by_document(model)
    assert documents_are_isolated(model, CPU, longest=64)


def test_the_check_sees_what_a_short_convolution_lets_through() -> None:
    """Weights so small that an absolute tolerance of 1e-3 saw nothing."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    conv = torch.nn.Conv1d(64, 64, 4, groups=64, padding=3)
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(
        lambda module, args, y: y + 0.3 * conv(y.transpose(1, 2))[..., :-3].transpose(1, 2)
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    assert not documents_are_isolated(model, CPU)


def test_lengths_of_documents() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [3, 4, 0, 1, 2, 3]])
    expected = torch.tensor([[3, 3, 3, 2, 2, 1], [5, 5, 4, 4, 4, 4]])
    assert torch.equal(compute_document_lengths(positions), expected)
