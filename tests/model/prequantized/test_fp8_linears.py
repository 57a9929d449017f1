"""FP8 directories: decoded as by transformers and compressed-tensors, read by shares, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import FP8Experts

from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.skeleton import build_skeleton
from dist_peft.quant.fp8 import Fp8Codec
from dist_peft.store.reader import RowReader
from tests.support import packed
from tests.support.packed_floats import from_fp8, save_compressed_fp8, save_fp8, save_tokenized
from tests.support.prequantized_models import base_of, linears, load, logits

NEEDS_LOADER = pytest.mark.skipif(
    hasattr(FP8Experts, "_impl_tp_layer_overrides"),
    reason="this transformers fails to load FP8 bases where no kernels are installed",
)

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed.save_plain(tmp_path_factory.mktemp("plain"))


@NEEDS_LOADER
@pytest.mark.parametrize("tile", [(16, 32), None], ids=["tiles", "a tensor"])
def test_logits_are_those_of_transformers(
    tile: tuple[int, int] | None, plain: Path, tmp_path: Path
) -> None:
    directory = save_fp8(plain, tmp_path / "base", tile)
    skeleton = load(directory)
    original = tf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = linears(skeleton)
    assert len(found) == 14
    for name, linear in found.items():
        assert linear.codec == Fp8Codec(32 if tile else 65536)
        weight = original.get_parameter(name)
        assert torch.equal(linear.dequantize_weight(torch.float32), weight)
    torch.testing.assert_close(logits(skeleton.model), logits(original), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu, torch.uint8])
def test_tiles_that_do_not_divide_rows_and_columns(
    dtype: torch.dtype, plain: Path, tmp_path: Path
) -> None:
    """96 columns and 64 rows in tiles of 24 x 40; scales in 16 bits, and as powers of two."""
    directory = save_fp8(plain, tmp_path / "base", (24, 40))
    files = load_file(directory / "model.safetensors")
    for name in [n for n in files if n.endswith("_inv")]:
        byte = dtype == torch.uint8
        scales = files[name].to(torch.float8_e8m0fnu if byte else dtype)
        files[name] = scales.view(torch.uint8) if byte else scales
    packed.save(files, directory)
    for weight, linear in linears(load(directory)).items():
        scales = files[f"{weight}_scale_inv"]
        if dtype == torch.uint8:
            scales = torch.pow(2.0, scales.double() - 127)
        if not weight.endswith(("0.self_attn.k_proj.weight", "1.mlp.down_proj.weight")):
            continue  # the definition is slow
        wanted = from_fp8(files[weight], scales, 24, 40)
        assert torch.equal(linear.dequantize_weight(torch.float32), wanted)


@pytest.mark.parametrize("strategy", ["channel", "tensor", "block"])
def test_compressed_tensors_as_the_library_decompresses(
    strategy: str, plain: Path, tmp_path: Path
) -> None:
    directory = save_compressed_fp8(plain, tmp_path / "base", strategy)
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    settings = packed.read_config(directory)["quantization_config"]["config_groups"]["group_0"]
    scheme = QuantizationScheme(**settings)
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    files = load_file(directory / "model.safetensors")
    for weight, linear in linears(load(directory)).items():
        stem = weight.removesuffix("weight")
        state = {n.removeprefix(stem): t for n, t in files.items() if n.startswith(stem)}
        wanted = compressor.decompress(state, scheme)["weight"]
        assert torch.equal(linear.dequantize_weight(wanted.dtype), wanted)


def test_rows_of_a_part_are_read_alone(plain: Path, tmp_path: Path) -> None:
    """Borders inside of tiles: the rows' bytes, and the scales of each tile that they touch."""
    directory = save_fp8(plain, tmp_path / "base", (24, 32))
    whole = linears(load(directory))
    skeleton = build_skeleton(base_of(directory), directory)
    with RowReader(skeleton.index) as reader:
        for name, linear in linears(skeleton).items():
            assert linear.stored is not None
            for span in (Span(0, 23), Span(23, 25), Span(25, linear.out_features), Span(9, 9)):
                before = reader.bytes_read
                part = linear.stored.read_packed_rows(reader, span)
                assert torch.equal(part, whole[name].packed[span.slice])
                tiles = len({row // 24 for row in range(span.start, span.stop)})
                groups = linear.in_features // 32
                wanted = len(span) * linear.in_features + 4 * tiles * groups
                assert reader.bytes_read - before == wanted


# -- experts ---------------------------------------------------------------------------------------

MIXTURES: dict[str, tf.PretrainedConfig] = {
    "deepseek_v3": tf.DeepseekV3Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "qwen3_moe": tf.Qwen3MoeConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    ),
}


@NEEDS_LOADER
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    plain = save_tokenized(MIXTURES[family], tmp_path / "plain")
    directory = save_fp8(plain, tmp_path / "base", (8, 32), skip=("kv_a_proj_with_mqa.weight",))
    skeleton = load(directory)
    original = tf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    layer: Any = skeleton.model.model.layers[1]
    for name in ("gate_up_proj", "down_proj"):
        stack = layer.mlp.experts.get_submodule(name)
        weight: Tensor = original.model.layers[1].mlp.experts.get_parameter(name)
        assert stack.codec == Fp8Codec(32)
        assert torch.equal(stack.dequantize_weight(torch.float32).view(weight.shape), weight)
    torch.testing.assert_close(logits(skeleton.model), logits(original), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("save", [packed.save_gptq, packed.save_awq, packed.save_own])
def test_experts_of_integer_formats(save: Any, tmp_path: Path) -> None:
    """Codes of each expert are those that encoding its rows gives; a layer left alone is plain."""
    plain = save_tokenized(MIXTURES["qwen3_moe"], tmp_path / "plain")
    left = tuple(
        f"layers.0.mlp.experts.{e}.{n}_proj.weight" for e in range(3) for n in ("gate", "up")
    )
    directory = save(plain, tmp_path / "base", skip=left)
    skeleton = load(directory)
    encoded = load(plain, quant={"kind": "int", "bits": 4, "group_size": packed.GROUP})
    for number in range(2):
        for name in ("gate_up_proj", "down_proj"):
            path = f"model.layers.{number}.mlp.experts.{name}"
            mine, wanted = skeleton.model.get_submodule(path), encoded.model.get_submodule(path)
            if (number, name) == (0, "gate_up_proj"):
                assert mine.stored is None and mine.codec.name == "raw"
            else:
                assert torch.equal(mine.packed, wanted.packed)


def test_experts_of_two_kinds_are_refused(tmp_path: Path) -> None:
    plain = save_tokenized(MIXTURES["qwen3_moe"], tmp_path / "plain")
    left = "layers.0.mlp.experts.1.up_proj.weight"
    directory = packed.save_own(plain, tmp_path / "base", skip=(left,))
    with pytest.raises(UserError, match=rf"not all stored alike: model\.{left} is not quantized"):
        load(directory)


# -- what is refused -------------------------------------------------------------------------------


def test_refused(plain: Path, tmp_path: Path) -> None:
    tiled, channel = save_fp8(plain, tmp_path / "fp8"), save_compressed_fp8(plain, tmp_path / "ct")
    files = load_file(tiled / "model.safetensors")
    nan = files[f"{Q_PROJ}.weight"].clone()
    nan.view(torch.uint8)[9, 3] = 0x7F
    group = packed.read_config(channel)["quantization_config"]["config_groups"]["group_0"]
    weights = group["weights"]

    def with_weights(**changes: Any) -> dict[str, Any]:
        return {"config_groups": {"group_0": {**group, "weights": {**weights, **changes}}}}

    cases: list[tuple[Path, dict[str, Any], dict[str, Tensor], str]] = [
        (
            tiled,
            {"weight_block_size": [16]},
            {},
            r"weight_block_size \[16\] .*two positive numbers",
        ),
        (tiled, {"weight_block_size": [16, 12]}, {}, "multiple of 8"),
        (tiled, {"weight_block_size": [8, 32]}, {}, r"_inv .* is float32 \[4, 2\], but .*\[8, 2\]"),
        (tiled, {"weight_block_size": None}, {}, r"_inv .* is float32 \[4, 2\], but .*\[1\]"),
        (tiled, {}, {f"{Q_PROJ}.weight": nan}, "NaN in row 9, column 3"),
        (tiled, {}, {f"{Q_PROJ}.weight": nan.to(torch.int8)}, "is int8 .* it is float8_e4m3fn"),
        (
            tiled,
            {},
            {f"{Q_PROJ}.weight_scale_inv": files[f"{Q_PROJ}.weight_scale_inv"] * torch.inf},
            "a scale is not finite",
        ),
        (channel, with_weights(num_bits=4), {}, "with 4 bits of type 'float'; 8 bits"),
        (channel, with_weights(strategy="group"), {}, "one scale a group; strategies channel,"),
        (channel, with_weights(symmetric=False), {}, "FP8 with zero points"),
        (channel, {"transform_config": {"a": 1}}, {}, "has transform_config in its"),
    ]
    for number, (source, settings, changes, text) in enumerate(cases):
        directory = packed.copy(source, tmp_path / str(number))
        packed.change_settings(directory, **settings)
        if changes:
            packed.change_tensors(directory, lambda tensors, new=changes: tensors.update(new))
        with pytest.raises(UserError, match=text):
            load(directory)
