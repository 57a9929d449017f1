"""Stacks of experts and names as mlx-lm has them, decoded by hand and loaded by mlx-lm."""

import os
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from dist_peft.core.errors import UserError
from dist_peft.export.formats.registry import export_model
from tests.support.export_runs import llama, make_run
from tests.support.gguf_configs import config_of_family
from tests.support.packed import unpack

OWNERS = {"gpt_oss": "mlp.experts", "granitemoe": "block_sparse_moe.switch_mlp"}
FILES = {
    "gpt_oss": "mlp.experts.gate_up_proj",
    "granitemoe": "block_sparse_moe.input_linear.weight",
}


def decode(tensors: dict[str, torch.Tensor], stem: str) -> torch.Tensor:
    scale, shift = tensors[f"{stem}.scales"], tensors[f"{stem}.biases"]
    codes = unpack(tensors[f"{stem}.weight"].flatten(0, 1), 8).view(*scale.shape, 32)
    return (codes * scale.unsqueeze(-1) + shift.unsqueeze(-1)).flatten(2)


@pytest.mark.parametrize("family", OWNERS)
def test_stacks_are_a_tensor_for_each_projection(family: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, None, config=config_of_family(family))
    export_model("mlx", run.job(tmp_path / "out", bits=8, group_size=32, chunk_bytes=4 * 64 * 6))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    given = load_file(run.directory / "model.safetensors")
    stack = given[f"model.layers.1.{FILES[family]}"].float()
    turns = family == "gpt_oss"
    stack = stack.transpose(1, 2) if turns else stack
    wanted = (stack[:, ::2], stack[:, 1::2]) if turns else stack.chunk(2, 1)
    for own, rows in zip(("gate_proj", "up_proj"), wanted, strict=True):
        found = decode(tensors, f"model.layers.1.{OWNERS[family]}.{own}")
        step = tensors[f"model.layers.1.{OWNERS[family]}.{own}.scales"].abs().max()
        assert found.shape == rows.shape and (found - rows).abs().max() <= 0.51 * step
    if turns:
        biases = given["model.layers.0.mlp.experts.gate_up_proj_bias"].float()
        assert torch.equal(tensors["model.layers.0.mlp.experts.gate_proj.bias"], biases[:, ::2])
        assert torch.equal(tensors["model.layers.0.mlp.experts.up_proj.bias"], biases[:, 1::2])
        assert "model.layers.0.mlp.experts.down_proj.bias" in tensors
    assert not any("gate_up" in name or "input_linear" in name for name in tensors)


def test_types_that_mlx_has_not_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = make_run(tmp_path, None, config=config_of_family("arcee"))
    with pytest.raises(
        UserError, match=r"not written as mlx: mlx is written for .*, not for arcee"
    ):
        export_model("mlx", run.job(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def mlx_config(family: str) -> tf.PretrainedConfig:
    known = tf.models.auto.configuration_auto.CONFIG_MAPPING
    kinds = ["linear_attention", "full_attention"]
    if family == "olmo_hybrid":
        wanted = known[family]().to_dict().keys() - {"model_type", "rope_parameters"}
        sizes = {key: value for key, value in llama().to_dict().items() if key in wanted}
        sizes |= {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "layer_types": kinds}
        return known[family](**sizes, linear_key_head_dim=16, linear_value_head_dim=16)
    return config_of_family(family)


@pytest.mark.e2e
@pytest.mark.parametrize(
    "family",
    ["gpt_oss", "granitemoe", "deepseek_v3", "gemma3_text", "glm4_moe", "qwen3_moe", "olmo_hybrid"],
)
def test_mlx_computes_the_trained_logits(family: str, tmp_path: Path) -> None:
    if "DIST_PEFT_MLX_PYTHON" not in os.environ:
        pytest.skip("DIST_PEFT_MLX_PYTHON names no Python with mlx-lm")
    run = make_run(tmp_path, None, config=mlx_config(family))
    exported = export_model("mlx", run.job(tmp_path / "out", bits=8, group_size=32))
    assert run.verify("mlx", exported)[1].relative < 0.1
