"""Fused encoders against torch, byte for byte: interpreted on a CPU, compiled on a GPU."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.nf4 import NF4_LEVELS, Nf4Codec, list_nf4_borders
from tests.support.device_rows import (
    CODECS,
    DEVICE,
    DTYPES,
    MARKS,
    SHAPES,
    describe_rows,
    has_same_bits,
    make_weights,
    prepare_kernels,
)

prepare_kernels()
pytestmark = MARKS
from dist_peft.quant import device_encode  # noqa: E402

CASES = [
    (codec, SHAPES[(5 * number + 2 * part) % len(SHAPES)], DTYPES[(number + part) % 3])
    for number, codec in enumerate(CODECS)
    for part in range(2)
]


def quantize(codec: Nf4Codec | AffineCodec, weight: Tensor) -> Tensor | None:
    layout = describe_rows(codec, weight.shape[1])
    if isinstance(codec, Nf4Codec):
        return device_encode.quantize_nf4_rows(weight, layout)
    return device_encode.quantize_affine_rows(weight, layout)


@pytest.mark.parametrize(("codec", "shape", "dtype"), CASES, ids=str)
def test_encodes_to_the_bytes_of_torch(
    codec: Nf4Codec | AffineCodec, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = make_weights(*shape, dtype)
    assert has_same_bits(quantize(codec, weight), codec.quantize_to_packed(weight))


def test_encodes_several_runs_of_scales() -> None:
    weight = make_weights(1, 8 * 256 * 2 + 9)
    assert has_same_bits(quantize(Nf4Codec(8), weight), Nf4Codec(8).quantize_to_packed(weight))


def test_a_value_on_a_border_takes_the_lower_code() -> None:
    borders = torch.tensor(list_nf4_borders())
    near = [borders, *(borders.nextafter(torch.tensor(end)) for end in (-2.0, 2.0))]
    values = torch.cat((*near, torch.tensor(NF4_LEVELS)))
    row = functional.pad(values, (0, 64 - len(values)), value=1.0)[None].to(DEVICE)
    assert has_same_bits(quantize(Nf4Codec(64), row), Nf4Codec(64).quantize_to_packed(row))


def test_affine_halves_are_rounded_to_even() -> None:
    """Codes and zeros between two integers."""
    for bits in (2, 4, 8):
        top = 2.0**bits - 1
        row = torch.arange(-3, 61, device=DEVICE).float() / 2 % top
        row[0], row[1] = top - 0.5, -0.5
        codec = AffineCodec(bits, 64)
        assert has_same_bits(quantize(codec, row[None]), codec.quantize_to_packed(row[None]))


def test_columns_may_lie_apart() -> None:
    weight = make_weights(70, 3).T
    for codec in (Nf4Codec(8), AffineCodec(4, 8)):
        assert has_same_bits(quantize(codec, weight), codec.quantize_to_packed(weight))
    wide = make_weights(3, 90)[:, 5:75]
    assert has_same_bits(quantize(Nf4Codec(64), wide), Nf4Codec(64).quantize_to_packed(wide))


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("codec", [Nf4Codec(8), Nf4Codec(8, False), AffineCodec(4, 8)], ids=str)
def test_no_bytes_of_a_weight_that_is_not_finite(codec: Nf4Codec | AffineCodec, bad: float) -> None:
    weight = make_weights(2, 70)
    assert quantize(codec, weight) is not None
    weight[1, 69] = bad
    assert quantize(codec, weight) is None


def test_no_bytes_where_a_scale_is_beyond_float16() -> None:
    weight = torch.zeros(1, 64, device=DEVICE)
    weight[0, 3] = 1e7
    assert quantize(AffineCodec(4, 64), weight) is None
    assert quantize(Nf4Codec(64), weight) is not None


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_encodes_large_weights_on_a_gpu(codec: Nf4Codec | AffineCodec) -> None:
    for rows, columns in ((1000, 4096), (65, 14336), (129, 4097), (70000, 8)):
        weight = make_weights(rows, columns, torch.bfloat16)
        found = quantize(codec, weight)
        assert found is not None
        assert has_same_bits(found.cpu(), codec.quantize_to_packed(weight.cpu()))
