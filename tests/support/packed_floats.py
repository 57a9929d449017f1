"""Directories in FP8 and MXFP4, quantized by slow references or by the formats' own libraries."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

from tests.support import packed
from tests.support.tiny_models import save_model
from tests.support.tiny_runs import save_words

LEVELS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

GPT_OSS = tf.GptOssConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=3,
    num_experts_per_tok=2,
    sliding_window=8,
    max_position_embeddings=64,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
"""Experts that are stored transposed, with biases and a gate of their own; attention sinks."""

EXPERTS = (".gate_up_proj", ".down_proj")


def save_tokenized(config: tf.PretrainedConfig, directory: Path, **options: Any) -> Path:
    save_model(config, directory, **options)
    save_words(directory)
    return directory


def to_mxfp4(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``[..., in]`` -> blocks ``[..., in / 32, 16]`` and exponents ``[..., in / 32]``: the nearest
    of all levels, the least exponent that cuts nothing."""
    groups = rows.double().unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1)
    exponent = torch.tensor([math.ceil(math.log2(a / 6)) for a in largest.flatten().tolist()])
    exponent = exponent.view(largest.shape)
    size = groups.abs() / torch.pow(2.0, exponent.double()).unsqueeze(-1)
    codes = (size.unsqueeze(-1) - LEVELS.double()).abs().argmin(-1) + 8 * (groups < 0)
    blocks = codes[..., 0::2] + 16 * codes[..., 1::2]
    return blocks.to(torch.uint8), (exponent + 127).to(torch.uint8)


def save_mxfp4(plain: Path, out: Path) -> Path:
    """As gpt-oss is published: experts in blocks and exponents, rows of products together."""
    shutil.copytree(plain, out)
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(plain / "model.safetensors").items():
        if name.endswith(EXPERTS):
            blocks, scales = to_mxfp4(value.transpose(1, 2))
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            tensors[name] = value
    packed.save(tensors, out)
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    packed.set_config(out, quantization_config=settings)
    return out


def to_fp8(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Codes ``float8 [out, in]`` and a scale for each tile, tile by tile."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = weight[part].abs().max() / 448
            codes[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def from_fp8(codes: Tensor, scales: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse, a weight at a time."""
    weight = torch.empty(codes.shape)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            weight[i, j] = codes[i, j].float() * scales[i // rows, j // columns].float()
    return weight


def save_fp8(
    plain: Path,
    out: Path,
    tile: tuple[int, int] | None = (16, 32),
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Path:
    """As DeepSeek-V3 and Qwen are published; without tiles one scale a tensor."""

    def convert(stem: str, weight: Tensor) -> dict[str, Tensor]:
        codes, scales = to_fp8(weight, *(tile or weight.shape))
        scales = scales.to(dtype) if tile else scales[0, 0].to(dtype)
        return {f"{stem}.weight": codes, f"{stem}.weight_scale_inv": scales}

    settings = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": tile and list(tile),
    }
    return packed.repack(plain, out, settings, convert, **options)


def save_compressed_fp8(plain: Path, out: Path, strategy: str = "channel", **options: Any) -> Path:
    """By compressed-tensors' own functions, with activations rounded as in FP8-dynamic models."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(
        num_bits=8,
        type="float",
        strategy=strategy,
        block_structure=[16, 32] if strategy == "block" else None,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("float-quantized")

    def convert(stem: str, weight: Tensor) -> dict[str, Tensor]:
        if strategy == "channel":
            scale = weight.abs().amax(1, keepdim=True) / 448
        elif strategy == "block":
            scale = to_fp8(weight, 16, 32)[1]
        else:
            scale = weight.abs().max().view(1) / 448
        state = {"weight": weight, "weight_scale": scale}
        return {f"{stem}.{n}": t for n, t in compressor.compress(state, scheme).items()}

    activations = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": args.model_dump(mode="json"),
                "input_activations": activations,
            }
        },
        "ignore": ["lm_head"],
    }
    return packed.repack(plain, out, settings, convert, **options)


def save_compressed_fp4(plain: Path, out: Path, kind: str = "nvfp4", **options: Any) -> Path:
    """By compressed-tensors' own functions; ``kind``: nvfp4 or mxfp4."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = QuantizationArgs(
        num_bits=4,
        type="float",
        strategy="tensor_group" if kind == "nvfp4" else "group",
        group_size=16 if kind == "nvfp4" else 32,
        scale_dtype=torch.float8_e4m3fn if kind == "nvfp4" else torch.uint8,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    layout = f"{kind}-pack-quantized"
    compressor = BaseCompressor.get_value_from_registry(layout)

    def convert(stem: str, weight: Tensor) -> dict[str, Tensor]:
        groups = weight.unflatten(1, (-1, args.group_size))
        state = {"weight": weight}
        if kind == "nvfp4":
            state["weight_global_scale"] = generate_gparam(weight.min(), weight.max()).view(1)
        factor = state.get("weight_global_scale")
        low, high = groups.amin(-1), groups.amax(-1)
        state["weight_scale"], _ = calculate_qparams(low, high, args, global_scale=factor)
        return {f"{stem}.{n}": t for n, t in compressor.compress(state, scheme).items()}

    settings = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}
        },
        "ignore": ["lm_head"],
    }
    return packed.repack(plain, out, settings, convert, **options)
