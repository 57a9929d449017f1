"""GPTQ, AWQ and compressed-tensors: against the consumer's own dequantization; what is refused."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

from dist_peft.core.errors import UserError
from dist_peft.quant.ordered_columns import OrderedColumnsCodec
from tests.support import packed
from tests.support.prequantized_models import IDS, linears, load, logits

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed.save_plain(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    ("bits", "symmetric", "per_row", "dtype"),
    [
        (4, False, False, torch.float16),
        (8, True, True, torch.bfloat16),
        (3, False, True, torch.bfloat16),
        (2, False, False, torch.float32),
    ],
)
def test_compressed_tensors_as_the_library_decompresses(
    bits: int, symmetric: bool, per_row: bool, dtype: torch.dtype, plain: Path, tmp_path: Path
) -> None:
    """float16 and bfloat16 scales: equal, in their type. float32 scales are rounded to float16."""
    directory = packed.save_compressed(
        plain, tmp_path / "base", bits, symmetric=symmetric, per_row=per_row, dtype=dtype
    )
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    settings = packed.read_config(directory)["quantization_config"]["config_groups"]["group_0"]
    scheme = QuantizationScheme(**settings)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors = load_file(directory / "model.safetensors")
    skeleton = load(directory)
    for weight, linear in linears(skeleton).items():
        stem = weight.removesuffix("weight")
        state = {n.removeprefix(stem): t for n, t in tensors.items() if n.startswith(stem)}
        wanted = compressor.decompress(state, scheme)["weight"]
        rtol = 2.0**-11 if dtype == torch.float32 else 0.0
        torch.testing.assert_close(linear.dequantize_weight(dtype), wanted, rtol=rtol, atol=0)
    assert skeleton.prequantized is not None
    note = skeleton.prequantized.describe_scale_rounding()
    if dtype != torch.float32:
        assert note is None
    else:
        assert note is not None and "rounded to float16: they changed by at most 0.0" in note


def test_compressed_tensors_logits_in_transformers(plain: Path, tmp_path: Path) -> None:
    directory = packed.save_compressed(plain, tmp_path / "base", dtype=torch.float16)
    with pytest.warns(UserWarning, match="quantization_config"):
        model = tf.AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            quantization_config=tf.CompressedTensorsConfig(dequantize=True),
        )
    error = (logits(load(directory).model) - logits(model.eval())).abs().max()
    print(f"largest difference of a logit: {error:.1e}")
    assert error < 2e-3  # the library multiplies in float16


def test_zeros_of_rows_that_fill_no_word(tmp_path: Path) -> None:
    """compressed-tensors pads: 12 rows of 3 bits are 36 of 64 bits."""
    changes = {"head_dim": 12, "hidden_size": 96, "num_attention_heads": 8}
    plain = packed.save_plain(tmp_path / "plain", num_key_value_heads=1, **changes)
    for bits in (3, 4):
        directory = packed.save_compressed(plain, tmp_path / f"{bits}", bits, dtype=torch.float16)
        k_proj = linears(load(directory))["model.layers.0.self_attn.k_proj.weight"]
        tensors = load_file(directory / "model.safetensors")
        packed_zeros = tensors["model.layers.0.self_attn.k_proj.weight_zero_point"]
        assert packed_zeros.shape[0] == -(-12 * bits // 32)
        parts = k_proj.codec.split_packed_rows(k_proj.packed, 96)
        stream = [int(w) & 0xFFFFFFFF for w in packed_zeros[:, 1]]
        number = sum(w << 32 * i for i, w in enumerate(stream))
        wanted = [number >> bits * row & 2**bits - 1 for row in range(12)]
        assert parts.zero[:, 1].tolist() == wanted


@pytest.mark.e2e
@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4, "sym": True},
        {"bits": 4, "sym": False},
        {"bits": 3, "sym": False, "format": "gptq_v2"},
        {"bits": 4, "sym": False, "quant_method": "awq", "format": "gemm"},
    ],
    ids=lambda s: " ".join(map(str, s.values())),
)
def test_directories_that_gptqmodel_writes(settings: dict[str, Any], tmp_path: Path) -> None:
    """Decoded weights equal but for its rounding to float16; logits; and our export of it."""
    python = os.environ.get("DIST_PEFT_GPTQ_PYTHON")
    if python is None:
        pytest.skip("DIST_PEFT_GPTQ_PYTHON names no Python with gptqmodel")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    plain = packed.save_plain(tmp_path / "plain", **sizes)
    script, out = Path(__file__).parents[2] / "support" / "gptqmodel_base.py", tmp_path / "base"
    text = json.dumps({"group_size": 32, "desc_act": False, **settings})
    command = [python, script, plain, out, text, *map(str, IDS[0].tolist())]
    # its default number of workers is too few on a machine with two cores; it logs into the
    # working directory
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2"}
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)

    skeleton, wanted = load(out), load_file(f"{out}.safetensors")
    error = (logits(skeleton.model)[:1] - wanted.pop("logits")).abs().max()
    print(f"largest difference of a logit: {error:.1e}; {len(wanted)} weights compared")
    assert error < 5e-3  # it computes weights in float16, and AWQ's activations too
    assert len(wanted) == 14 or "quant_method" in settings
    found = {name.removesuffix(".weight"): linear for name, linear in linears(skeleton).items()}
    for name, weight in wanted.items():
        decoded = found[name].codec.dequantize_rows(
            found[name].packed, weight.shape[1], torch.float32
        )
        assert torch.equal(decoded.half(), weight.half()), name


@pytest.mark.parametrize(("version", "bits"), [(1, 4), (2, 3), (2, 8)])
def test_act_order(version: int, bits: int, plain: Path, tmp_path: Path) -> None:
    """``(code - zero[g_idx]) * scale[g_idx]``, as GPTQ's libraries decode; every linear has an
    order of its own."""
    directory = packed.save_gptq(plain, tmp_path / "b", bits, version=version, act_order=True)
    tensors, skeleton = load_file(directory / "model.safetensors"), load(directory)
    for weight, linear in linears(skeleton).items():
        stem = weight.removesuffix(".weight")
        codes, zero = (
            packed.unpack(tensors[f"{stem}.{name}"].T.contiguous(), bits).T
            if name == "qweight"
            else packed.unpack(tensors[f"{stem}.{name}"], bits)
            for name in ("qweight", "qzeros")
        )
        zero = (zero + (version == 1)) % 2**bits
        groups = tensors[f"{stem}.g_idx"].long()
        assert not torch.equal(groups, groups.sort().values)
        scale = tensors[f"{stem}.scales"].float()[groups]
        wanted = ((codes - zero[groups]) * scale).T
        assert isinstance(linear.codec, OrderedColumnsCodec)
        assert torch.equal(linear.dequantize_weight(torch.float32), wanted)


def test_compressed_tensors_with_group_order(plain: Path, tmp_path: Path) -> None:
    """``weight_g_idx`` (actorder: group); unpacked by the library, which groups no more (0.20)."""
    directory = packed.save_compressed(plain, tmp_path / "base", dtype=torch.float16)
    generator = torch.Generator().manual_seed(1)

    def permute(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(".weight_packed")]:
            stem, columns = name.removesuffix("_packed"), tensors[name].shape[1] * 8
            order = torch.randperm(columns, generator=generator)
            tensors[f"{stem}_g_idx"] = (torch.arange(columns) // packed.GROUP)[order].int()

    packed.change_tensors(directory, permute)
    from compressed_tensors.compressors.pack_quantized.base import unpack_from_int32

    tensors = load_file(directory / "model.safetensors")
    for weight, linear in linears(load(directory)).items():
        groups = tensors[f"{weight}_g_idx"].long()
        shape = tensors[f"{weight}_shape"].tolist()
        codes = unpack_from_int32(tensors[f"{weight}_packed"], 4, shape)
        scale, words = tensors[f"{weight}_scale"], tensors[f"{weight}_zero_point"]
        zero = unpack_from_int32(words, 4, scale.shape, packed_dim=0)
        wanted = (codes.float() - zero.float()[:, groups]) * scale.float()[:, groups]
        assert torch.equal(linear.dequantize_weight(torch.float32), wanted)


# -- what is refused -------------------------------------------------------------------------------

Change = Callable[[dict[str, Tensor]], Any]


def drop(ending: str) -> Change:
    return lambda tensors: tensors.pop(f"{Q_PROJ}{ending}")


def replace(ending: str, value: Tensor) -> Change:
    return lambda tensors: tensors.update({f"{Q_PROJ}{ending}": value})


def flip_order(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q_PROJ}.g_idx"] = tensors[f"{Q_PROJ}.g_idx"].flip(0)


def nothing(tensors: dict[str, Tensor]) -> None:
    pass


GROUP_0 = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}


def group(**weights: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {**GROUP_0, "weights": {**GROUP_0["weights"], **weights}}}}


REFUSED: list[tuple[str, dict[str, Any], Change, str]] = [
    ("gptq", {}, flip_order, r"q_proj\.g_idx .*though quantization_config has desc_act: false"),
    ("gptq", {"desc_act": True}, replace(".g_idx", torch.zeros(64).int()), "32 columns into each"),
    ("gptq", {"desc_act": True}, drop(".g_idx"), r"desc_act: true but no .*q_proj\.g_idx"),
    ("gptq", {"bits": 5}, nothing, r"has bits 5 in its quantization_config; 2, 3, 4 and 8"),
    ("gptq", {"checkpoint_format": "marlin"}, nothing, r"in the layout 'marlin'; gptq and gptq_v2"),
    ("gptq", {"checkpoint_format": "gptq_p"}, nothing, "in the layout 'gptq_p'"),
    ("gptq", {"checkpoint_format": "gptq", "bits": 3}, nothing, "writers disagree.*as gptq_v2"),
    ("gptq", {"pack_dtype": "int16"}, nothing, "packed into int16 words"),
    ("gptq", {"group_size": 12}, nothing, "group_size 12 .*multiples of 8"),
    ("gptq", {"group_size": 64}, nothing, r"qzeros .* is int32 \[2, 8\], but .* int32 \[1, 8\]"),
    ("gptq", {"group_size": 128}, nothing, "q_proj has 64 in_features, which groups of 128 do not"),
    ("gptq", {}, drop(".scales"), rf"no {Q_PROJ}\.scales: it is incomplete"),
    ("gptq", {"bits": 8}, nothing, r"qweight .* is int32 \[\d+, \d+\], but by config.*int32 \["),
    ("gptq", {}, replace(".scales", torch.zeros(2, 64).double()), r"float64 \[2, 64\], but by"),
    ("gptq", {}, replace(".scales", torch.full((2, 64), 1e6)), "row.*scale 1e.06 of group 0 is b"),
    ("awq", {"version": "gemv"}, nothing, "in the layout 'gemv'; gemm is read"),
    ("awq", {"bits": 8}, nothing, "AWQ of 8 bits; 4 are read"),
    ("awq", {"zero_point": False}, nothing, "without zeros"),
    ("ct", {"config_groups": {}}, nothing, "has 0 config_groups"),
    ("ct", {"format": "int-quantized"}, nothing, "of format 'int-quantized'"),
    ("ct", group(type="float"), nothing, "weights of type 'float'"),
    ("ct", group(num_bits=6), nothing, "has num_bits 6"),
    ("ct", group(strategy="block"), nothing, "one scale a block; strategies group and channel"),
    ("ct", {"transform_config": {"a": 1}}, nothing, "has transform_config in its quantization"),
    ("ct", {}, replace(".weight_g_idx", torch.zeros(64).int()), "32 columns into each"),
    ("ct", {}, replace(".weight_shape", torch.tensor([64, 63])), r"weight_shape is \[64, 63\]"),
    ("ct", {}, drop(".weight_zero_point"), "no .*weight_zero_point: it is incomplete"),
]


@pytest.fixture(scope="module")
def good(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("good")
    return {
        "gptq": packed.save_gptq(plain, root / "gptq"),
        "awq": packed.save_awq(plain, root / "awq"),
        "ct": packed.save_compressed(plain, root / "ct"),
    }


@pytest.mark.parametrize(("name", "settings", "change", "text"), REFUSED)
def test_refused(
    name: str,
    settings: dict[str, Any],
    change: Change,
    text: str,
    good: dict[str, Path],
    tmp_path: Path,
) -> None:
    directory = packed.copy(good[name], tmp_path / "base")
    packed.change_settings(directory, **settings)
    if change is not nothing:
        packed.change_tensors(directory, change)
    with pytest.raises(UserError, match=text):
        load(directory)
