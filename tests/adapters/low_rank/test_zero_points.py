import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_peft.adapters.directory import open_adapter_merger
from dist_peft.adapters.lora.merge import LoraMerger
from dist_peft.adapters.low_rank.zero_points import (
    measure_lost_share,
    merge_into_zeros,
    unmerge_from_zeros,
)
from dist_peft.core.config.run import LoraConfig, LowRankConfig, QaLoraConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span, row_span
from dist_peft.quant.affine import AffineCodec, AffineParts
from tests.support.adapters import adapted, disturb, int_codec, save, tiny_llama

Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def decode(parts: AffineParts) -> Tensor:
    """The codec's formula in float64."""
    codes = parts.codes.double().unflatten(1, (parts.scale.shape[1], -1))
    zero, scale = parts.zero.double()[..., None], parts.scale.double()[..., None]
    return ((codes - zero) * scale).flatten(1)


def base_parts(bits: int, rows: int = 24, columns: int = 64, size: int = 16) -> AffineParts:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.02
    codec = AffineCodec(bits, size)
    return codec.split_packed_rows(codec.quantize_to_packed(weight), columns)


def change(rms: float, rows: int = 24, groups: int = 4) -> Tensor:
    return torch.randn(rows, groups, generator=torch.Generator().manual_seed(2)) * rms


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rms", [1e-4, 1e-2, 1.0])
def test_merge_is_exact_to_float32_rounding(bits: int, rms: float) -> None:
    parts, D = base_parts(bits), change(rms)
    merged = merge_into_zeros(parts, D)
    assert merged.codes is parts.codes and merged.scale is parts.scale
    assert merged.zero.dtype == torch.float32
    wanted = decode(parts) + D.double().repeat_interleave(16, 1)
    error = (decode(merged) - wanted).abs()
    bound = (merged.zero.double().abs() * parts.scale.double() * 2**-24).repeat_interleave(16, 1)
    assert (error <= bound + 1e-15).all()
    if rms == 1e-4:
        print(f"int{bits}: {error.max() / D.abs().max():.1e} of the largest change")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rms", [1e-4, 1e-2, 1.0, 50.0])
def test_unmerge_restores_integer_zeros(bits: int, rms: float) -> None:
    parts, D = base_parts(bits), change(rms)
    back = unmerge_from_zeros(merge_into_zeros(parts, D), D, integer=True)
    assert back.zero.dtype == parts.zero.dtype and torch.equal(back.zero, parts.zero)


@settings(deadline=None)
@given(
    zero=st.integers(0, 255),
    steps=st.floats(-(2.0**22), 2.0**22),
    scale=st.floats(2.0**-24, 100, width=16),
)
def test_unmerge_of_any_integer_zero(zero: int, steps: float, scale: float) -> None:
    half = torch.tensor([[scale]]).half()
    D = (steps * half.double()).float()
    parts = AffineParts(torch.zeros(1, 8, dtype=torch.uint8), half, torch.tensor([[zero]]).half())
    assert torch.equal(
        unmerge_from_zeros(merge_into_zeros(parts, D), D, integer=True).zero, parts.zero
    )


@settings(deadline=None)
@given(
    zero=st.floats(2.0**-6, 15, width=16),
    sign=st.sampled_from([-1, 1]),
    steps=st.floats(-32, 32),
    scale=st.floats(2.0**-20, 1, width=16),
)
def test_unmerge_of_a_fractional_zero(zero: float, sign: int, steps: float, scale: float) -> None:
    half = torch.tensor([[scale]]).half()
    D = (steps * half.double()).float()
    kept = torch.tensor([[zero * sign]]).half()
    parts = AffineParts(torch.zeros(1, 8, dtype=torch.uint8), half, kept)
    assert torch.equal(unmerge_from_zeros(merge_into_zeros(parts, D), D, integer=False).zero, kept)


def test_zeros_that_cannot_come_back() -> None:
    parts = AffineParts(torch.zeros(1, 8, dtype=torch.uint8), torch.ones(1, 1), torch.ones(1, 1))
    D = torch.full((1, 1), 2.0**24)
    with pytest.raises(ValueError, match="beyond"):
        unmerge_from_zeros(merge_into_zeros(parts, D), D, integer=True)


# -- rounding --------------------------------------------------------------------------------------


def slow_share(parts: AffineParts, D: Tensor, bits: int) -> float:
    lost, total = 0.0, 0.0
    for row in range(D.shape[0]):
        for group in range(D.shape[1]):
            zero, scale = float(parts.zero[row, group]), float(parts.scale[row, group])
            rounded = min(max(round(zero - float(D[row, group]) / scale), 0), 2**bits - 1)
            lost += ((zero - rounded) * scale - float(D[row, group])) ** 2
            total += float(D[row, group]) ** 2
    return math.sqrt(lost / total)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("rms", [1e-4, 1e-3, 1e-2])
def test_lost_share(bits: int, rms: float) -> None:
    parts, D = base_parts(bits), change(rms)
    share = measure_lost_share([(parts, D)], bits)
    assert share == pytest.approx(slow_share(parts, D, bits), rel=1e-6)
    halves = [(AffineParts(*(x[a:b] for x in parts)), D[a:b]) for a, b in ((0, 7), (7, 24))]
    assert measure_lost_share(halves, bits) == pytest.approx(share)
    if rms == 1e-4:
        assert share == 1.0  # nothing of a usual adapter is left


def test_lost_share_of_whole_steps_and_of_nothing() -> None:
    parts = base_parts(4)
    D = torch.where(parts.zero > 4, parts.scale.float(), 0.0)  # zero' = zero - 1
    assert measure_lost_share([(parts, D)], 4) == 0.0
    assert measure_lost_share([(parts, torch.zeros_like(D))], 4) == 0.0


# -- through the files -----------------------------------------------------------------------------


def merger(
    directory: Path, method: type[LowRankConfig] = QaLoraConfig, **settings: Any
) -> LoraMerger:
    model, adapter = adapted(tiny_llama(), int_codec(), method=method, r=4, **settings)
    disturb(model)
    return open_adapter_merger(save(model, adapter, directory))


def parts_of(weight: str) -> tuple[AffineParts, Tensor]:
    rows = tiny_llama().state_dict()[weight]
    codec = int_codec()
    assert isinstance(codec, AffineCodec)
    packed = codec.quantize_to_packed(rows)
    return codec.split_packed_rows(packed, rows.shape[1]), codec.dequantize_rows(
        packed, rows.shape[1], torch.float32
    )


@pytest.mark.parametrize("weight", [Q, DOWN])
@pytest.mark.parametrize("ranks", [1, 3])
def test_merge_parts_equals_merge_rows(weight: str, ranks: int, tmp_path: Path) -> None:
    both = merger(tmp_path)
    parts, rows = parts_of(weight)
    for rank in range(ranks):
        span = row_span(rows.shape[0], ranks, rank)
        own = AffineParts(*(x[span.slice] for x in parts))
        exact = both.merge_affine_parts(weight, own, span)
        dense = both.merge_weight_rows(weight, rows[span.slice], span, "decoded")
        torch.testing.assert_close(decode(exact).float(), dense, rtol=1e-6, atol=1e-7)
        back = both.unmerge_affine_parts(weight, exact, span)
        assert all(torch.equal(a, b) for a, b in zip(back, own, strict=True))
        delta = both.compute_delta_rows(weight, span)
        torch.testing.assert_close(rows[span.slice] + delta, dense, rtol=1e-6, atol=1e-7)


def test_merged_rows_count(tmp_path: Path) -> None:
    one = merger(tmp_path, target_modules=["q_proj"])
    parts, _ = parts_of(Q)
    one.merge_affine_parts(Q, parts, Span(0, 32))
    assert one.list_unused_tensors() == [Q.replace("layers.0", "layers.1")]


def test_pool_over_several_groups(tmp_path: Path) -> None:
    model, adapter = adapted(
        tiny_llama(),
        int_codec(),
        method=QaLoraConfig,
        r=2,
        pool_size=32,
        target_modules=["q_proj"],
    )
    disturb(model)
    wide = open_adapter_merger(save(model, adapter, tmp_path))
    D = wide.compute_group_change(Q, parts_of(Q)[0], Span(3, 9))
    assert D.shape == (6, 2) and torch.equal(D[:, 0], D[:, 1]) and bool(D.any())


def test_plain_lora_is_refused(tmp_path: Path) -> None:
    plain = merger(tmp_path / "lora", LoraConfig)
    message = r"q_proj\.weight: the adapter changes the weights of a group of 16 differently.*QA-L"
    with pytest.raises(UserError, match=message):
        plain.merge_affine_parts(Q, parts_of(Q)[0], Span(0, 32))
    dora = merger(tmp_path / "dora", LoraConfig, use_dora=True)
    with pytest.raises(UserError, match=message):
        dora.merge_affine_parts(Q, parts_of(Q)[0], Span(0, 32))


def test_groups_of_another_base(tmp_path: Path) -> None:
    own = merger(tmp_path)
    coarse = AffineCodec(4, 32)
    weight = tiny_llama().state_dict()[Q]
    with pytest.raises(UserError, match="a group of 32 differently"):
        own.merge_affine_parts(
            Q, coarse.split_packed_rows(coarse.quantize_to_packed(weight), 32), Span(0, 32)
        )
    wide = AffineCodec(4, 16)
    with pytest.raises(UserError, match="belongs to another base"):
        own.merge_affine_parts(
            Q, wide.split_packed_rows(wide.quantize_to_packed(torch.zeros(32, 64)), 64), Span(0, 32)
        )
