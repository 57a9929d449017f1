"""NF4 against bitsandbytes and against plain definitions."""

from bisect import bisect_left

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_peft.quant.exact_math import exact_sqrt
from dist_peft.quant.nf4 import (
    NF4_LEVELS,
    Nf4Codec,
    _build_fine_cells,
    _build_level_cells,
    _find_nearest_level,
    list_nf4_borders,
)
from dist_peft.quant.pack import unpack_bits

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def bnb_quantize(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """bitsandbytes' payload and first-level absmax, as rows."""
    functional = pytest.importorskip("bitsandbytes.functional")
    payload, state = functional.quantize_4bit(weight, blocksize=group_size, quant_type="nf4")
    return payload.view(weight.shape[0], -1), state.absmax.view(weight.shape[0], -1)


def assert_equals_bnb(weight: Tensor, group_size: int) -> None:
    expected, expected_absmax = bnb_quantize(weight, group_size)
    for double_quant in (True, False):
        codec = Nf4Codec(group_size, double_quant)
        payload, _ = codec.split_packed_rows(codec.quantize_to_packed(weight), weight.shape[1])
        assert torch.equal(payload, expected)
    assert torch.equal(codec.compute_absmax(weight), expected_absmax)
    _, stored = codec.split_packed_rows(codec.quantize_to_packed(weight), weight.shape[1])
    assert torch.equal(stored, expected_absmax)


# -- the code table ---------------------------------------------------------------------------


def test_levels_are_quantiles_of_the_normal() -> None:
    # QLoRA, appendix E: 8 quantiles on the negative side, 9 on the positive, zero shared
    normal = torch.distributions.Normal(0.0, 1.0)
    end = 0.9677083
    positive = normal.icdf(torch.linspace(end, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(end, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat((negative, positive.new_zeros(1), positive.flip(0)))
    levels /= levels.abs().max()
    assert torch.allclose(torch.tensor(NF4_LEVELS, dtype=torch.float64), levels, atol=1e-6)


def test_levels_and_borders_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    ops = pytest.importorskip("bitsandbytes.backends.default.ops")
    cpu = torch.device("cpu")
    assert torch.equal(torch.tensor(NF4_LEVELS), functional.get_4bit_type("nf4", device=cpu))
    borders, _ = ops._get_4bit_quantize_bounds("nf4", cpu)
    assert torch.equal(torch.tensor(list_nf4_borders()), borders)


# -- the nearest level ------------------------------------------------------------------------


def neighbours(values: Tensor, steps: int) -> Tensor:
    """Each float32 value and the ``steps`` next ones on both sides."""
    below, above = [values], [values]
    for _ in range(steps):
        below.append(torch.nextafter(below[-1], torch.tensor(-torch.inf)))
        above.append(torch.nextafter(above[-1], torch.tensor(torch.inf)))
    return torch.cat(below + above[1:])


def test_each_cell_holds_at_most_one_border() -> None:
    edges = torch.arange(-16, 17) / 16
    borders = torch.tensor(list_nf4_borders())
    counts = torch.diff(torch.bucketize(edges, borders))
    assert counts.max() == 1
    first_code, border = _build_level_cells(torch.device("cpu"))
    assert first_code.shape == border.shape == (33,)
    fine = _build_fine_cells()
    assert int((fine & 0x80).count_nonzero()) == 15  # each border in a fine cell of its own


def test_ties_and_neighbours_of_every_border_cell_and_level() -> None:
    borders = list_nf4_borders()
    special = torch.cat(
        (torch.tensor(borders), torch.tensor(NF4_LEVELS), torch.arange(-16, 17) / 16)
    )
    values = neighbours(special, 5)
    codes = _find_nearest_level(values)
    assert codes.tolist() == [bisect_left(borders, v) for v in values.tolist()]
    # a value on a border takes the lower code
    assert _find_nearest_level(torch.tensor(borders)).tolist() == list(range(15))


@settings(deadline=None)
@given(st.lists(st.floats(-1.0, 1.0, width=32), min_size=1, max_size=50))
def test_nearest_level_is_the_number_of_borders_below(values: list[float]) -> None:
    borders = list_nf4_borders()
    wanted = [bisect_left(borders, v) for v in values]
    assert _find_nearest_level(torch.tensor(values)).tolist() == wanted
    assert _find_nearest_level(torch.tensor(values * 8)).tolist() == wanted * 8  # by the table


def test_borders_split_blocks_as_in_bitsandbytes() -> None:
    values = neighbours(torch.tensor(list_nf4_borders()), 31)
    blocks = torch.ones(15, 64)
    blocks[:, 1:] = values.view(63, 15).t()  # the leading 1 makes the scale exactly 1
    assert_equals_bnb(blocks, 64)


def test_scaling_rounds_as_in_bitsandbytes() -> None:
    # w * (1 / absmax) and w / absmax can lie on different sides of a border
    torch.manual_seed(0)
    absmax = torch.rand(400, 1) + 0.5
    near = neighbours(torch.tensor(list_nf4_borders()) * absmax, 1).view(3, 400, 15)
    blocks = absmax * torch.ones(64)
    blocks[:, 1:46] = near.permute(1, 0, 2).reshape(400, 45)
    assert_equals_bnb(blocks, 64)
    products = _find_nearest_level(blocks * (1.0 / absmax))
    assert not torch.equal(products, _find_nearest_level(blocks / absmax)), (
        "the weights test nothing"
    )


# -- equality with bitsandbytes ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, 512])
def test_payload_and_absmax_equal_bitsandbytes(dtype: torch.dtype, group_size: int) -> None:
    torch.manual_seed(group_size)
    weight = (torch.randn(48, 1536) * 0.05).to(dtype)
    weight[3] = 0
    weight[5, :group_size] = 0
    weight[6, :group_size] *= -0.0
    weight[7] *= 1e-3
    assert_equals_bnb(weight[:, : 1536 // group_size * group_size].contiguous(), group_size)


@pytest.mark.parametrize("size", [1e-45, 1e-42, 1e-39, 0.9e-38, 1.1e-38, 1e-30, 1e30, 3e38])
def test_extreme_blocks_equal_bitsandbytes(size: float) -> None:
    torch.manual_seed(1)
    weight = (torch.rand(8, 128, dtype=torch.float64) * 2 - 1).mul_(size).float()
    assert_equals_bnb(weight, 64)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 5),
    blocks=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-20, 20),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_random_weights_equal_bitsandbytes(
    rows: int, blocks: int, seed: int, exponent: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 64 * blocks, generator=generator) * 10.0**exponent
    assert_equals_bnb(weight.to(dtype), 64)


def test_single_level_decodes_as_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(20, 256, dtype=torch.bfloat16)
    expected = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4"))
    codec = Nf4Codec(64, double_quant=False)
    assert torch.equal(
        codec.dequantize_rows(codec.quantize_to_packed(weight), 256, torch.bfloat16), expected
    )


# -- definition, padding, errors --------------------------------------------------------------


def slow_single_level(weight: Tensor, group_size: int) -> list[list[float]]:
    """Decoded weights by the formula of the module, one element at a time in float32."""
    borders, result = list_nf4_borders(), []
    for row in weight:
        decoded: list[float] = []
        for start in range(0, len(row), group_size):
            block = row[start : start + group_size]
            absmax = max(abs(w) for w in block.tolist())
            inverse = torch.tensor(1.0) / torch.tensor(absmax).clamp(min=1e-38)
            for w in block:
                level = torch.tensor(NF4_LEVELS[bisect_left(borders, float(w * inverse))])
                decoded.append(float(level * absmax))
        result.append(decoded)
    return result


@pytest.mark.parametrize("group_size", [8, 24, 64])
@pytest.mark.parametrize("in_features", [1, 7, 50, 64, 65])
def test_equals_the_formula_with_a_padded_last_block(group_size: int, in_features: int) -> None:
    torch.manual_seed(in_features)
    weight = torch.randn(3, in_features)
    codec = Nf4Codec(group_size, double_quant=False)
    packed = codec.quantize_to_packed(weight)
    decoded = codec.dequantize_rows(packed, in_features, torch.float32)
    assert decoded.tolist() == slow_single_level(weight, group_size)
    payload, absmax = codec.split_packed_rows(packed, in_features)
    assert absmax.shape == (3, -(-in_features // group_size))
    padding = unpack_bits(payload, 4, high_first=True)[:, in_features:]
    assert padding.eq(7).all(), "padding is the code of 0"


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("in_features", [512, 4096, 64 * 300, 64 * 513])
def test_error_is_at_most_half_the_widest_gap(double_quant: bool, in_features: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, in_features)
    codec = Nf4Codec(64, double_quant)
    absmax = codec.compute_absmax(weight)
    packed = codec.quantize_to_packed(weight)
    decoded = codec.dequantize_rows(packed, in_features, torch.float32)
    half_gap = (1 - 0.6961928009986877) / 2
    scale_error = (codec.split_packed_rows(packed, in_features)[1] - absmax).abs()
    bound = half_gap * absmax * (1 + 1e-6) + scale_error
    assert ((decoded - weight).abs().view(4, -1, 64) <= bound.unsqueeze(-1)).all()


# -- double quantization ----------------------------------------------------------------------


def test_layout_is_the_documented_one() -> None:
    weight = torch.randn(2, 64 * 300)
    codec = Nf4Codec()
    packed = codec.quantize_to_packed(weight)
    payload = 32 * 300
    assert packed.shape[1] == codec.num_row_bytes(64 * 300) == payload + 2 * 8 + 300
    roots = exact_sqrt(codec.compute_absmax(weight)[1])
    statistics = packed[1, payload : payload + 16].clone().view(torch.float32)
    codes = packed[1, payload + 16 :].float()
    for run, (first, last) in enumerate(((0, 256), (256, 300))):
        offset, scale = statistics[2 * run], statistics[2 * run + 1]
        part = roots[first:last]
        assert offset == part.min()
        assert scale == (part.max() - part.min()) / 255
        assert torch.equal(codes[first:last], ((part - offset) / scale).round())
    _, absmax = codec.split_packed_rows(packed, 64 * 300)
    expected = (codes[256:] * statistics[3] + statistics[2]) ** 2
    assert torch.equal(absmax[1, 256:], expected)


def test_scales_are_within_half_a_step() -> None:
    torch.manual_seed(3)
    weight = torch.randn(16, 64 * 256) * torch.rand(16, 64 * 256).pow(3)
    codec = Nf4Codec()
    exact = codec.compute_absmax(weight)
    _, stored = codec.split_packed_rows(codec.quantize_to_packed(weight), weight.shape[1])
    roots = exact.sqrt()
    step = (roots.amax(1, keepdim=True) - roots.amin(1, keepdim=True)) / 255
    assert ((stored.sqrt() - roots).abs() <= step * 0.5001 + 1e-6).all()
    ends = exact.argmin(1), exact.argmax(1)
    for index in ends:
        assert torch.allclose(stored[range(16), index], exact[range(16), index], rtol=1e-5)


def test_equal_scales_and_zero_blocks_are_exact() -> None:
    weight = torch.randn(2, 1024)
    weight[:, ::64] = 5.0  # every block has absmax 5
    codec = Nf4Codec()
    _, absmax = codec.split_packed_rows(codec.quantize_to_packed(weight), 1024)
    assert torch.allclose(absmax, torch.full_like(absmax, 5.0), rtol=1e-6)
    weight[0, :512] = 0
    decoded = codec.dequantize_rows(codec.quantize_to_packed(weight), 1024, torch.float32)
    assert decoded[0, :512].eq(0).all()


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 8, 255, 256, 257, 1000])
def test_second_level_only_where_it_saves(blocks: int) -> None:
    double, single = Nf4Codec(64, True), Nf4Codec(64, False)
    compressed = -(-(8 * -(-blocks // 256) + blocks) // 4) * 4
    expected = 32 * blocks + min(compressed, 4 * blocks)
    assert double.num_row_bytes(64 * blocks) == expected
    assert single.num_row_bytes(64 * blocks) == 36 * blocks
    weight = torch.randn(2, 64 * blocks)
    if blocks <= 3:
        assert torch.equal(double.quantize_to_packed(weight), single.quantize_to_packed(weight))


def heavy_tailed(kind: str) -> Tensor:
    torch.manual_seed(0)
    shape = (256, 8192)
    if kind == "student-t 2":
        return torch.distributions.StudentT(2.0).sample(shape) * 0.02
    if kind == "student-t 1.5":
        return torch.distributions.StudentT(1.5).sample(shape) * 0.02
    weight = torch.randn(shape) * 0.02
    if kind == "outlier column":
        weight[:, 7] *= 300
    if kind == "rows of other sizes":
        weight *= torch.randn(256, 1).exp()
    if kind == "zero block":
        weight[:, :64] = 0
    return weight


@pytest.mark.parametrize(
    "kind",
    [
        "gaussian",
        "student-t 2",
        "student-t 1.5",
        "outlier column",
        "rows of other sizes",
        "zero block",
    ],
)
def test_double_quantization_is_no_worse_than_that_of_bitsandbytes(kind: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = heavy_tailed(kind)

    def rms(decoded: Tensor) -> float:
        return float((decoded - weight).double().pow(2).mean().sqrt())

    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    theirs = rms(functional.dequantize_4bit(packed, state))
    codec, single = Nf4Codec(), Nf4Codec(64, double_quant=False)
    ours = rms(codec.dequantize_rows(codec.quantize_to_packed(weight), 8192, torch.float32))
    without = rms(single.dequantize_rows(single.quantize_to_packed(weight), 8192, torch.float32))
    assert ours <= 1.001 * theirs
    assert ours <= 1.02 * without


@pytest.mark.parametrize("group_size", [0, 4, 12, -8])
def test_group_size_is_a_multiple_of_8(group_size: int) -> None:
    with pytest.raises(
        ValueError, match=f"group_size {group_size} is not a positive multiple of 8"
    ):
        Nf4Codec(group_size)
