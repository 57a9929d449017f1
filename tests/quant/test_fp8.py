"""FP8 rows against a search of the nearest number, transformers and compressed-tensors."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from dist_peft.core.config.run import QuantConfig
from dist_peft.quant.codec import make_codec
from dist_peft.quant.fp8 import Fp8Codec

NUMBERS = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()


def round_slowly(scaled: float) -> float:
    """The nearest E4M3 number, halves to the even code; by comparison with all of them."""
    finite = [(float(n), code) for code, n in enumerate(NUMBERS[:127])]
    best = min(finite, key=lambda n: (abs(n[0] - abs(scaled)), n[1] % 2))
    return best[0] if scaled >= 0 else -best[0]


@pytest.mark.parametrize(("group", "columns"), [(128, 200), (8, 21), (65536, 37)])
def test_encodes_the_nearest_number(group: int, columns: int) -> None:
    codec = Fp8Codec(group)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, columns, generator=generator)
    weight *= 10.0 ** torch.linspace(-37, 37, 9).unsqueeze(1)
    weight[2] = 0
    packed = codec.quantize_to_packed(weight)
    assert packed.shape == (9, codec.num_row_bytes(columns))
    groups = -(-columns // group)
    scales = codec.read_statistics(packed, columns)
    assert scales.shape == (9, groups)
    decoded = codec.dequantize_rows(packed, columns, torch.float32)
    for row in range(9):
        for number, part in enumerate(weight[row].split(group)):
            scale = max(part.abs().max() / torch.tensor(448.0), torch.tensor(2.0**-126))
            assert scales[row, number] == (scale if part.any() else 1)
            rounded = [round_slowly(float(w / scales[row, number])) for w in part]
            wanted = torch.tensor(rounded) * scales[row, number]
            found = decoded[row, number * group : number * group + len(part)]
            assert torch.equal(found, wanted), (row, number)


def test_decodes_tiles_as_transformers() -> None:
    """Rows of a tile have copies of its scale; bfloat16 and float32 results are equal."""
    owner = SimpleNamespace(
        quantization_config=SimpleNamespace(weight_block_size=(16, 32), scale_fmt="float")
    )
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(2))
    made = Fp8Quantize(owner).convert({"a.weight": weight})
    codes, tiles = made["a.weight"], made["a.weight_scale_inv"]
    codec = Fp8Codec(32)
    packed = codec.join_packed_rows(codes, tiles.repeat_interleave(16, 0))
    for dtype in (torch.float32, torch.bfloat16):
        wanted = Fp8Dequantize(owner)._dequantize_one(codes, tiles, dtype)
        assert torch.equal(codec.dequantize_rows(packed, 96, dtype), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_decodes_a_scale_a_row_as_compressed_tensors(dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    generator = torch.Generator().manual_seed(3)
    codes = torch.randn(7, 52, generator=generator).mul(80).to(torch.float8_e4m3fn)
    scale = torch.rand(7, 1, generator=generator).mul(1e-2).to(dtype)
    codec = Fp8Codec(65536)
    packed = codec.join_packed_rows(codes, scale)
    args = QuantizationArgs(num_bits=8, type="float", strategy="channel")
    wanted: Tensor = dequantize(codes, scale, args=args)
    assert wanted.dtype == dtype
    assert torch.equal(codec.dequantize_rows(packed, 52, dtype), wanted)


def test_refuses_codes_without_a_number() -> None:
    codes = torch.ones(3, 8).to(torch.float8_e4m3fn)
    for bad in (0x7F, 0xFF):
        codes.view(torch.uint8)[1, 5] = bad
        with pytest.raises(ValueError, match="NaN in row 1, column 5"):
            Fp8Codec(8).join_packed_rows(codes, torch.ones(3, 1))


def test_configuration() -> None:
    quant = QuantConfig(kind="fp8")
    assert make_codec(quant, torch.bfloat16) == Fp8Codec(128) and quant.bits == 8
    assert make_codec(QuantConfig(kind="fp8", group_size=64), torch.float16) == Fp8Codec(64)
    assert QuantConfig(**quant.model_dump()) == quant
    with pytest.raises(ValueError, match="fp8 has 8 bits, not 4"):
        QuantConfig(kind="fp8", bits=4)
    with pytest.raises(ValueError, match="fp8 rounds to nearest; solver gptq"):
        QuantConfig(kind="fp8", solver="gptq")
    with pytest.raises(ValueError, match="not a positive multiple of 8"):
        Fp8Codec(12)
