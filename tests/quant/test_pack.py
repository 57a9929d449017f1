"""Bit streams against a bit-by-bit reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_peft.quant.pack import lookup_packed_values, pack_bits, unpack_bits

WIDTHS = (2, 3, 4, 8)


def reference_pack(codes: list[int], bits: int) -> bytes:
    """The definition: code i occupies bits [i * bits, (i + 1) * bits) of the stream."""
    stream = 0
    for i, code in enumerate(codes):
        stream |= code << (i * bits)
    return stream.to_bytes(len(codes) * bits // 8, "little")


@st.composite
def code_rows(draw: st.DrawFn) -> tuple[Tensor, int]:
    bits = draw(st.sampled_from(WIDTHS))
    rows, eights = draw(st.integers(0, 4)), draw(st.integers(0, 9))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 8 * eights)
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator), bits


@settings(deadline=None)
@given(code_rows())
def test_packs_like_the_definition_and_back(case: tuple[Tensor, int]) -> None:
    codes, bits = case
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (codes.shape[0], codes.shape[1] * bits // 8)
    for row, stream in zip(codes.tolist(), packed.tolist(), strict=True):
        assert bytes(stream) == reference_pack(row, bits)
    assert torch.equal(unpack_bits(packed, bits), codes)


@settings(deadline=None)
@given(st.lists(st.integers(0, 15), min_size=8, max_size=64).filter(lambda c: len(c) % 8 == 0))
def test_high_first_puts_the_even_code_into_the_high_nibble(codes: list[int]) -> None:
    tensor = torch.tensor(codes, dtype=torch.uint8)
    packed = pack_bits(tensor, 4, high_first=True)
    pairs = zip(codes[::2], codes[1::2], strict=True)
    assert packed.tolist() == [even << 4 | odd for even, odd in pairs]
    assert torch.equal(unpack_bits(packed, 4, high_first=True), tensor)


@pytest.mark.parametrize("bits", WIDTHS)
def test_32_codes_are_as_many_little_endian_words_as_bits(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (64,), dtype=torch.uint8)
    words = pack_bits(codes, bits).view(torch.int32)
    assert words.numel() == 2 * bits
    stream = int.from_bytes(reference_pack(codes.tolist(), bits), "little")
    expected = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(2 * bits)]
    assert [word & 0xFFFFFFFF for word in words.tolist()] == expected


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_lookup_gives_the_value_of_each_code(bits: int, dtype: torch.dtype) -> None:
    values = tuple(float((7 * code + 3) % 251) for code in range(2**bits))
    codes = torch.randint(0, 2**bits, (3, 5, 48), dtype=torch.uint8)
    found = lookup_packed_values(pack_bits(codes, bits), bits, values, dtype)
    assert torch.equal(found, torch.tensor(values, dtype=dtype)[codes.long()])


def test_lookup_keeps_every_bit_of_a_value() -> None:
    # table entries move as wide elements; NaN payloads and signed zeros must survive that
    values = torch.tensor([0x7FC00001, -0x80000000, 0x00000001, 0x7F800000], dtype=torch.int32)
    floats = tuple(values.view(torch.float32).tolist())
    codes = torch.tensor([0, 1, 2, 3, 3, 2, 1, 1], dtype=torch.uint8)
    found = lookup_packed_values(pack_bits(codes, 2), 2, floats)
    stored = torch.tensor(floats).view(torch.int32)
    assert torch.equal(found.view(torch.int32), stored[codes.long()])


def test_works_on_views_that_are_not_contiguous() -> None:
    codes = torch.randint(0, 8, (6, 40), dtype=torch.uint8)
    wide = torch.zeros(6, 25, dtype=torch.uint8)
    wide[:, 3:18] = pack_bits(codes, 3)
    assert torch.equal(unpack_bits(wide[1:5, 3:18], 3), codes[1:5])


def test_tables_are_real_tensors_under_a_default_device() -> None:
    codes = torch.tensor([1, 0, 3, 2, 0, 1, 2, 3], dtype=torch.uint8)
    packed = pack_bits(codes, 2)
    with torch.device("meta"):
        found = lookup_packed_values(packed, 2, (0.5, 1.5, 2.5, 3.25))
    assert found.tolist() == [1.5, 0.5, 3.25, 2.5, 0.5, 1.5, 2.5, 3.25]


def test_refuses_what_it_cannot_pack() -> None:
    with pytest.raises(ValueError, match="code 8 does not fit into 3 bits"):
        pack_bits(torch.full((8,), 8, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match=r"uint8 \[..., 8 k\]"):
        pack_bits(torch.zeros(7, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="2, 3, 4 or 8 bits, not 5"):
        unpack_bits(torch.zeros(8, dtype=torch.uint8), 5)
    with pytest.raises(ValueError, match="only 4-bit codes"):
        pack_bits(torch.zeros(8, dtype=torch.uint8), 2, high_first=True)
    with pytest.raises(ValueError, match="3-bit codes come in 3 bytes; there are 4"):
        unpack_bits(torch.zeros(4, dtype=torch.uint8), 3)
