"""Which tensors of the files stand for which parameters, experts above all (others: skeleton)."""

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.model.expert_kinds import find_expert_modules
from dist_peft.model.naming import TensorNames, find_tensor_names
from dist_peft.model.skeleton import build_skeleton
from dist_peft.store.index import SafetensorsIndex
from tests.support.tiny_models import CONFIGS, MIXTURES, save_model


def names_of(directory: Path, config: tf.PretrainedConfig) -> TensorNames:
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config)
    index = SafetensorsIndex.open(directory)
    return find_tensor_names(model, index, None, find_expert_modules([model]), lambda name: False)


def change(directory: Path, edit: dict[str, Tensor | None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    kept = {name: t for name, t in {**tensors, **edit}.items() if t is not None}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("family", MIXTURES)
def test_every_tensor_of_experts_has_its_rows(
    family: str, headless: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = save_model(MIXTURES[family], tmp_path)
    if headless:
        tensors = load_file(tmp_path / "model.safetensors")
        stripped = {name.removeprefix("model."): t for name, t in tensors.items()}
        save_file(stripped, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tensors = load_file(tmp_path / "model.safetensors")
    names = names_of(tmp_path, MIXTURES[family])
    assert "does not use" not in caplog.text
    assert set(names.found_names.values()) == set(tensors)
    assert set(names.found_names) - set(tensors) >= set(names.stacks)
    for name, pieces in names.stacks.items():
        whole = torch.cat([tensors[piece.name] for piece in pieces])
        assert torch.equal(whole, original.get_parameter(name).flatten(0, 1))
        assert [piece.span.start for piece in pieces[1:]] == [p.span.stop for p in pieces[:-1]]


@pytest.mark.parametrize("layers", [1, 9])
def test_state_dict_is_made_once_for_any_number_of_layers(layers: int, tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIGS["llama"])
    config.num_hidden_layers = layers
    save_model(config, tmp_path)
    made, state_dict = [], torch.nn.Module.state_dict

    def counted(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        made.append(module)
        return state_dict(module, *args, **kwargs)

    with mock.patch.object(torch.nn.Module, "state_dict", counted):
        assert len(names_of(tmp_path, config).tensors) == 9 * layers + 3
    assert sum(isinstance(module, tf.LlamaForCausalLM) for module in made) == 1


def test_more_than_ten_experts_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    config = copy.deepcopy(MIXTURES["qwen3_moe"])
    config.num_experts, config.moe_intermediate_size = 12, 8
    save_model(config, tmp_path)
    pieces = names_of(tmp_path, config).stacks["model.layers.1.mlp.experts.down_proj"]
    found = [piece.name for piece in pieces]
    assert found == [f"model.layers.1.mlp.experts.{i}.down_proj.weight" for i in range(12)]


def test_dense_models_have_no_stacks(tmp_path: Path) -> None:
    save_model(CONFIGS["llama"], tmp_path)
    names = names_of(tmp_path, CONFIGS["llama"])
    assert names.stacks == {} and names.found_names == names.tensors


EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"


def test_refuses_damaged_experts(tmp_path: Path) -> None:
    config = MIXTURES["qwen3_moe"]
    save_model(config, tmp_path)
    change(tmp_path, {EXPERT: torch.zeros(64, 8)})
    with pytest.raises(UserError, match=rf"{EXPERT} has shape \[64, 8\] .* asks for \[64, 40\]"):
        names_of(tmp_path, config)
    change(tmp_path, {EXPERT: None})
    with pytest.raises(UserError, match=r"has 2 experts next to .*config\.json asks for 3"):
        names_of(tmp_path, config)
    others = {EXPERT.replace(".2.", f".{i}."): None for i in range(3)}
    change(tmp_path, dict(others))
    with pytest.raises(UserError, match=r"lacks 1 tensors .* such as .*1\.mlp\.experts\.down_proj"):
        names_of(tmp_path, config)


def test_refuses_one_quantized_expert(tmp_path: Path) -> None:
    save_model(MIXTURES["qwen3_moe"], tmp_path)
    change(tmp_path, {EXPERT: None, EXPERT.replace("weight", "packed"): torch.zeros(64, 36).byte()})
    config = (tmp_path / "config.json").read_text()
    settings = '"quantization_config": {"quant_method": "dist_peft", "kind": "nf4"},'
    (tmp_path / "config.json").write_text(config.replace("{", "{" + settings, 1))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts\.0\.down_proj\.weight are not"):
        build_skeleton(BaseConfig(path="unused"), tmp_path)


def test_names_of_the_model_are_not_renamed(tmp_path: Path) -> None:
    """``transformers`` renames ``norm`` of published DeepSeek-V4 files within layers; in files that
    it has written, the pattern would hit the last norm, too. Integer buffers are read as they are.
    """
    config = tf.DeepseekV4Config(
        vocab_size=97,
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
        q_lora_rank=32,
        o_lora_rank=32,
        o_groups=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=8,
        sliding_window=8,
        max_position_embeddings=64,
    )
    original = save_model(config, tmp_path)
    names = names_of(tmp_path, config)
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors[names.tensors["model.norm.weight"]], original.model.norm.weight)
    skeleton = build_skeleton(BaseConfig(path="u", quant=None, compute_dtype="float32"), tmp_path)
    buffers = dict(skeleton.model.named_buffers())
    whole = [name for name in names.tensors if name in buffers and "tid2eid" in name]
    assert whole and all(tensors[names.tensors[name]].dtype == torch.int64 for name in whole)
