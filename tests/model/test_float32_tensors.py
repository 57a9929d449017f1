"""Types of tensors as ``from_pretrained(dtype=bfloat16)`` has them, in training and in merges."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_peft.adapters.directory import write_adapter_directory
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.config.run import BaseConfig
from dist_peft.export.merge_weights import merge_model
from dist_peft.model.float32_tensors import is_kept_in_float32
from tests.support.loaded_models import IDS, load
from tests.support.tiny_models import _COMMON, _GROUPED

BF16 = torch.bfloat16
_ROUTED: dict[str, Any] = {"n_routed_experts": 16, "num_experts_per_tok": 2, "n_shared_experts": 1}
_ROUTED |= {"moe_intermediate_size": 32, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}
FAMILIES: dict[str, tf.PretrainedConfig] = {
    "deepseek_v3": tf.DeepseekV3Config(
        **_COMMON,
        **_ROUTED,
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
    "dots1": tf.Dots1Config(**_GROUPED, **_ROUTED, use_sliding_window=False),
    "glm4_moe": tf.Glm4MoeConfig(**_GROUPED, **_ROUTED),
    "ernie4_5_moe": tf.Ernie4_5_MoeConfig(
        **_GROUPED,
        moe_num_experts=16,
        moe_k=2,
        moe_intermediate_size=32,
        moe_layer_start_index=0,
        tie_word_embeddings=False,
    ),
    "minimax_m2": tf.MiniMaxM2Config(**_GROUPED, num_local_experts=16, num_experts_per_tok=2),
}
_BIAS = "e_score_correction_bias"


def save(family: str, directory: Path) -> None:
    """bfloat16, as checkpoints are, with correction biases in float32 that order the experts."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(FAMILIES[family]).to(BF16)
    for name, parameter in model.named_parameters():
        if is_kept_in_float32(model, name, BF16):
            parameter.data = parameter.data.float()
    for module in model.modules():
        bias = getattr(module, _BIAS, None)
        if isinstance(bias, Tensor):
            value = 8 + torch.rand(bias.shape) * 0.02  # bfloat16 has steps of 0.06 here
            if _BIAS in module._parameters:
                module._parameters[_BIAS] = nn.Parameter(value, False)
            else:
                module._buffers[_BIAS] = value
    model.save_pretrained(directory)


def head_adapter(directory: Path) -> None:
    """LoRA on the output head, which every family here has."""
    stem = "base_model.model.lm_head"
    tensors = {
        f"{stem}.lora_A.weight": torch.full((2, 64), 0.1),
        f"{stem}.lora_B.weight": torch.full((97, 2), 0.1),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["lm_head"]}
    write_adapter_directory(directory, PublicAdapter(config, tensors), {})


@torch.no_grad()
def chosen(model: Any) -> list[Tensor]:
    """Indices of experts that the routers choose for ``IDS``: arguments of the experts modules."""
    found: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda m, args: found.append(args[1].clone()))
        for module in model.modules()
        if hasattr(module, "gate_up_proj")
        and hasattr(module, "down_proj")
        and "Expert" in str(type(module).__name__)
    ]
    model(input_ids=IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.usefixtures("native_products")
@pytest.mark.parametrize("family", FAMILIES)
def test_types_and_routed_experts(family: str, tmp_path: Path) -> None:
    """DeepSeek-V3 and dots1 sent 12 to 19 % of their tokens to other experts when the bias was
    rounded."""
    save(family, tmp_path / "base")
    original = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=BF16, experts_implementation="eager"
    ).eval()
    mine = load(tmp_path / "base", compute_dtype="bfloat16").model
    wanted = original.state_dict()
    own = {name: t for name, t in mine.state_dict().items() if not name.endswith(".packed")}
    assert own
    for name, tensor in own.items():
        assert tensor.dtype == wanted[name].dtype, name
    biases = [name for name in own if name.endswith(_BIAS)]
    kept = torch.float32 if family != "minimax_m2" else BF16
    assert biases and {own[name].dtype for name in biases} == {kept}
    experts, expected = chosen(mine), chosen(original)
    assert len(experts) == len(expected) >= 1
    for one, other in zip(experts, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "minimax_m2"])
def test_types_in_merged_files(family: str, tmp_path: Path) -> None:
    """Each tensor has the base's type, and a correction bias its value, bit for bit."""
    save(family, tmp_path / "base")
    head_adapter(tmp_path / "adapter")
    base = BaseConfig(path=str(tmp_path / "base"), quant=None)
    merge_model(base, tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {n: t.dtype for n, t in after.items()} == {n: t.dtype for n, t in before.items()}
    biases = [n for n in after if n.endswith(_BIAS)]
    assert biases and all(torch.equal(after[n], before[n]) for n in biases)
    assert all(after[n].dtype == torch.float32 for n in biases)


def test_patterns_of_half_precision_alone() -> None:
    """gpt-oss' norms are float32 beside float16, not beside bfloat16."""
    model = nn.Module()
    model._keep_in_fp32_modules = ["norm", "a.*b"]
    model._keep_in_fp32_modules_strict = {"gate.weight"}
    assert is_kept_in_float32(model, "x.norm.weight", torch.float16)
    assert is_kept_in_float32(model, "x.a1.b", torch.float16)
    assert not is_kept_in_float32(model, "x.norm.weight", BF16)
    assert is_kept_in_float32(model, "mlp.gate.weight", BF16)
    assert not is_kept_in_float32(model, "mlp.gate.weight", torch.float32)
