"""Codes on kept scales and zeros, against a slow reference of Python numbers."""

import pytest
import torch

from dist_peft.quant.affine import AffineCodec, AffineParts
from dist_peft.quant.kept_grid import count_changed_codes, quantize_on_grid

ROWS, IN = 5, 42


def quantize_slowly(value: float, scale: float, zero: float, bits: int, own: int) -> int:
    if scale == 0:
        return own
    exact = torch.tensor(value) / torch.tensor(scale) + torch.tensor(zero)
    return max(0, min(2**bits - 1, round(float(exact))))


@pytest.mark.parametrize(
    "codec", [AffineCodec(b, 16, s) for b in (2, 3, 4, 8) for s in ("rtn", "hqq")], ids=str
)
def test_codes_move_and_the_grid_stays(codec: AffineCodec) -> None:
    """Rows of 42 columns: 6 of the last group are padding."""
    generator = torch.Generator().manual_seed(codec.bits)
    weight = torch.randn(ROWS, IN, generator=generator)
    kept = codec.quantize_to_packed(weight)
    parts = codec.split_packed_rows(kept, IN)
    parts.scale[1, 1] = 0
    parts.scale[2, 0] *= -1
    kept = codec.join_packed_rows(parts, IN)
    decoded = codec.dequantize_rows(kept, IN, torch.float32)
    assert torch.equal(quantize_on_grid(decoded, kept, codec, IN), kept)
    values = decoded + 0.3 * torch.randn(ROWS, IN, generator=generator)
    found = codec.split_packed_rows(quantize_on_grid(values, kept, codec, IN), IN)
    wanted = parts.codes.clone()
    for row in range(ROWS):
        for column in range(IN):
            group = (row, column // 16)
            wanted[row, column] = quantize_slowly(
                float(values[row, column]),
                float(parts.scale[group]),
                float(parts.zero[group]),
                codec.bits,
                int(parts.codes[row, column]),
            )
    assert all(torch.equal(*pair) for pair in zip(found, parts._replace(codes=wanted), strict=True))
    moved = int((wanted != parts.codes).sum())
    other = codec.join_packed_rows(AffineParts(wanted, parts.scale, parts.zero), IN)
    assert count_changed_codes(other, kept, codec, IN) == moved > 0


def test_values_that_are_not_finite_are_refused() -> None:
    codec = AffineCodec(4, 16)
    kept = codec.quantize_to_packed(torch.ones(ROWS, IN))
    values = torch.ones(ROWS, IN)
    values[3, 7] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity in row 3"):
        quantize_on_grid(values, kept, codec, IN)
