"""Products of sorted rows with packed weights of their own, several dequantized at a time."""

import functools
import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_peft.core.span import Span
from dist_peft.quant import cpu_products, grouped_matmul
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.assumed_device import assume_device
from dist_peft.quant.codec import Codec, RawCodec
from dist_peft.quant.frozen_matmul import frozen_matmul
from dist_peft.quant.grouped_matmul import (
    RowGroups,
    can_group_products,
    count_sorted,
    frozen_grouped_matmul,
    has_grouped_product,
)
from dist_peft.quant.nf4 import Nf4Codec

CODECS: list[Codec] = [Nf4Codec(), Nf4Codec(24), AffineCodec(3, 64), RawCodec(torch.bfloat16)]
OUT, IN = 37, 100


@pytest.fixture(autouse=True, params=[False, True], ids=["float32 products", "native products"])
def native_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether 16-bit products are computed as such, whatever processor this is."""
    monkeypatch.setattr(cpu_products, "_is_native_product_fast", lambda dtype: request.param)
    return bool(request.param)


def multiply_both_ways(
    packed: nn.Parameter, codec: Codec, counts: Sequence[int], dtype: torch.dtype, columns: int = IN
) -> list[tuple[Tensor, Tensor]]:
    """Product and gradient of ``x``: grouped, and each group by ``frozen_matmul``."""
    out = packed.shape[0] // len(counts)
    results = []
    for grouped in (True, False):
        torch.manual_seed(1)
        x = torch.randn(sum(counts), columns).to(dtype).requires_grad_()
        if grouped:
            groups = RowGroups.from_counts(counts)
            y = frozen_grouped_matmul(x, packed, codec, columns, groups)
        else:
            parts = zip(x.split(list(counts)), packed.split(out), strict=True)
            y = torch.cat([frozen_matmul(part, rows, codec, columns) for part, rows in parts])
        y.float().square().sum().backward()
        assert x.grad is not None
        results.append((y.detach(), x.grad))
    return results


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_groups_equal_products_of_their_own(
    codec: Codec, dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits, whether experts are dequantized alone or together, neighbors or not."""
    monkeypatch.setitem(grouped_matmul._CHUNK_ELEMENTS, "cpu", at_once * OUT * IN)
    torch.manual_seed(0)
    packed = nn.Parameter(codec.quantize_to_packed(torch.randn(6 * OUT, IN)), requires_grad=False)
    mine, theirs = multiply_both_ways(packed, codec, [3, 2, 0, 1, 0, 5], dtype)
    assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_for_all_groups(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's grouped product, here on a CPU: to rounding, in both directions and in parts."""
    calls: list[int] = []
    own = functional.grouped_mm

    def count_call(x: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
        assert offs.dtype == torch.int32 and int(offs[-1]) == len(x)
        calls.append(len(weights))
        result: Tensor = own(x, weights, offs=offs)
        return result

    monkeypatch.setattr(grouped_matmul, "can_group_products", lambda *operands: True)
    monkeypatch.setattr(functional, "grouped_mm", count_call)
    monkeypatch.setitem(grouped_matmul._CHUNK_ELEMENTS, "cpu", 2 * 40 * 96)
    torch.manual_seed(0)
    codec = Nf4Codec()
    packed = nn.Parameter(codec.quantize_to_packed(torch.randn(5 * 40, 96)), requires_grad=False)
    mine, theirs = multiply_both_ways(packed, codec, [3, 0, 4, 0, 9], dtype, 96)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for got, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max())
    assert calls == [2, 1, 2, 1]  # of forward and backward


def test_a_trial_decides_about_the_one_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A product that is wrong or absent is not used, and a warning says why, once; a CPU and odd
    sizes never ask."""
    monkeypatch.setattr(logging.getLogger("dist_peft"), "propagate", True)
    try_product = has_grouped_product.__wrapped__
    assert try_product("cpu", torch.float32) and try_product("cpu", torch.bfloat16)
    ask = partial(can_group_products, dtype=torch.bfloat16)
    assert not ask(torch.device("cpu"), widths=(64, 64))
    meta = torch.device("meta")  # stands for a device
    monkeypatch.setattr(grouped_matmul, "has_grouped_product", lambda kind, dtype: True)
    assert ask(meta, widths=(64, 8)) and not ask(meta, widths=(64, 12))
    own = functional.grouped_mm
    monkeypatch.setattr(functional, "grouped_mm", lambda *a, offs: own(*a, offs=offs).neg())
    assert not caplog.messages and not try_product("cpu", torch.float32)
    (message,) = caplog.messages
    assert "grouped product of float32 does not work on cpu: its results differ by" in message

    def fail(*operands: Tensor, offs: Tensor) -> Tensor:
        raise RuntimeError("no kernel for this device\nat line 7")

    monkeypatch.setattr(functional, "grouped_mm", fail)
    ask_twice = functools.cache(try_product)
    assert not ask_twice("cpu", torch.bfloat16) and not ask_twice("cpu", torch.bfloat16)
    assert caplog.messages[1:] == [
        "experts are multiplied one at a time, as PyTorch's grouped product of bfloat16 does not "
        "work on cpu: no kernel for this device"
    ]


@dataclass(frozen=True)
class Spy:
    """A codec that remembers, weakly, the weights it has decoded, and how many rows each had."""

    inner: Codec
    decoded: list[tuple["weakref.ref[Tensor]", int]] = field(default_factory=list)

    def dequantize_rows(self, packed: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
        weight = self.inner.dequantize_rows(packed, in_features, dtype)
        self.decoded.append((weakref.ref(weight), len(weight)))
        return weight


def test_only_weights_with_rows_are_decoded_and_the_packed_object_is_kept() -> None:
    codec = Spy(Nf4Codec())
    packed = nn.Parameter(codec.inner.quantize_to_packed(torch.randn(4 * OUT, IN)), False)
    x = torch.randn(3, IN, requires_grad=True)
    groups = RowGroups.from_counts([0, 2, 0, 1])
    y = frozen_grouped_matmul(x, packed, codec, IN, groups)  # type: ignore[arg-type]
    assert y.grad_fn is not None and y.grad_fn.packed is packed  # type: ignore[attr-defined]
    y.sum().backward()
    assert [(ref(), count) for ref, count in codec.decoded] == [(None, 2 * OUT)] * 2
    packed.data.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has no storage"):
        frozen_grouped_matmul(x, packed, codec, IN, groups)  # type: ignore[arg-type]


def test_groups_of_sorted_ids() -> None:
    counts = count_sorted(torch.tensor([0, 2, 2, 5]), 6)
    groups = RowGroups.read_counts(counts, 0)
    assert groups.counts == (1, 0, 2, 0, 0, 1) and groups.num_rows == 4
    assert groups.used == ((0, Span(0, 1)), (2, Span(1, 3)), (5, Span(3, 4)))
    assert groups == RowGroups.from_counts(groups.counts)
    assert [len(part) for part in groups.split_into_chunks(2)] == [2, 1]
    assert RowGroups.from_counts([0, 0, 2, 1, 0]).select(Span(2, 4)).counts == (2, 1)
    none = RowGroups.read_counts(count_sorted(torch.zeros(0, dtype=torch.long), 3), 0)
    assert none.counts == (0, 0, 0) and none.num_rows == 0
    with assume_device(torch.device("cpu")):
        assert RowGroups.read_counts(counts, 9).counts == (2, 2, 2, 3, 0, 0)
    assert RowGroups.assume_shares(9, Span(3, 5), 6).counts == (0, 0, 0, 4, 5, 0)
    assert RowGroups.assume_shares(0, Span(6, 6), 6).counts == (0,) * 6
    codec = RawCodec(torch.float32)
    packed = codec.quantize_to_packed(torch.randn(6, IN))
    assert frozen_grouped_matmul(torch.zeros(0, IN), packed, codec, IN, none).shape == (0, 2)


def test_wrong_shapes_are_refused() -> None:
    codec = RawCodec(torch.float32)
    packed = codec.quantize_to_packed(torch.randn(10, IN))
    with pytest.raises(ValueError, match=r"\[3, 100\], not .* \[2, 100\]"):
        frozen_grouped_matmul(torch.randn(2, IN), packed, codec, IN, RowGroups.from_counts([1, 2]))
    groups = RowGroups.from_counts([1, 1, 1])
    with pytest.raises(ValueError, match="10 packed rows are no 3 weights"):
        frozen_grouped_matmul(torch.randn(3, IN), packed, codec, IN, groups)
