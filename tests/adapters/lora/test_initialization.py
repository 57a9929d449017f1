import pytest
import torch
from torch import Tensor

from dist_peft.adapters.lora.initialization import (
    InitialFactors,
    init_loftq_factors,
    init_pissa_factors,
)
from dist_peft.adapters.low_rank.row_sharded import add_factor_product
from dist_peft.core.span import row_span
from tests.support.adapters import int_codec
from tests.support.matrices import decaying, dense_best
from tests.support.thread_ranks import run_ranks

SCALING = 2.5


def alone(tensor: Tensor) -> Tensor:
    return tensor


def weight(out: int = 64, features: int = 48) -> Tensor:
    """Like a trained weight: a few strong directions in noise."""
    noise = torch.randn(out, features, generator=torch.Generator().manual_seed(4))
    return 0.05 * noise + decaying(out, features)


def decoded(rows: Tensor, bits: int) -> Tensor:
    codec = int_codec(bits)
    return codec.dequantize_rows(codec.quantize_to_packed(rows), rows.shape[1], torch.float32)


def loftq_error(w: Tensor, start: InitialFactors, bits: int) -> float:
    """|| W - Q - s B0 A0 ||"""
    encoded = w
    if start.removed is not None:
        encoded = add_factor_product(w, start.removed.B, start.removed.A, -SCALING)
    fit = SCALING * start.factors.B @ start.factors.A
    return (w - decoded(encoded, bits) - fit).norm().item()


def test_pissa_takes_the_principal_part() -> None:
    w = weight()
    start = init_pissa_factors(w, 6, SCALING, iterations=16, seed=0, reduce=alone)
    assert start.removed is start.factors
    product = SCALING * start.factors.B @ start.factors.A
    torch.testing.assert_close(product, dense_best(w, 6).float(), rtol=0, atol=1e-5)
    rest = add_factor_product(w, start.factors.B, start.factors.A, -SCALING)
    values = torch.linalg.svdvals(w)
    torch.testing.assert_close(torch.linalg.svdvals(rest)[:40], values[6:46], rtol=0, atol=1e-5)


def test_pissa_quantizes_better() -> None:
    """The remainder has a smaller range: section 4 of the paper."""
    w = weight()
    start = init_pissa_factors(w, 8, SCALING, iterations=4, seed=0, reduce=alone)
    rest = add_factor_product(w, start.factors.B, start.factors.A, -SCALING)
    assert (rest - decoded(rest, 4)).norm() < 0.8 * (w - decoded(w, 4)).norm()


@pytest.mark.parametrize("bits", [2, 4])
def test_loftq_error_falls(bits: int) -> None:
    w = weight()
    plain = (w - decoded(w, bits)).norm().item()
    errors = [
        loftq_error(
            w,
            init_loftq_factors(w, 8, SCALING, int_codec(bits), iterations=t, seed=0, reduce=alone),
            bits,
        )
        for t in (1, 5)
    ]
    assert errors[0] < 0.85 * plain
    assert errors[1] < errors[0]


def test_loftq_equals_a_dense_reference() -> None:
    w = weight()
    product = torch.zeros_like(w)
    for _ in range(3):
        removed = product
        product = dense_best(w - decoded(w - removed, 2), 4).float()
    start = init_loftq_factors(w, 4, SCALING, int_codec(2), iterations=3, seed=0, reduce=alone)
    assert start.removed is not None
    found = [SCALING * f.B @ f.A for f in (start.removed, start.factors)]
    # the error's spectrum is flat: the vectors have not converged, what they explain has
    assert found[0].norm().item() == pytest.approx(removed.norm().item(), rel=0.02)
    assert found[1].norm().item() == pytest.approx(product.norm().item(), rel=0.02)
    assert loftq_error(w, start, 2) == pytest.approx(
        (w - decoded(w - removed, 2) - product).norm().item(), rel=0.01
    )


def test_one_alternation_removes_nothing() -> None:
    w = weight()
    start = init_loftq_factors(w, 4, SCALING, int_codec(4), iterations=1, seed=0, reduce=alone)
    assert start.removed is None
    expected = dense_best(w - decoded(w, 4), 4).norm().item()
    fit = SCALING * start.factors.B @ start.factors.A
    assert fit.norm().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("method", ["pissa", "loftq"])
@pytest.mark.parametrize("ranks", [2, 5])
def test_any_number_of_ranks(method: str, ranks: int) -> None:
    w = weight(out=9)

    def find(rank: int, reduce) -> InitialFactors:  # type: ignore[no-untyped-def]
        rows = w[row_span(9, ranks, rank).slice]
        if method == "pissa":
            return init_pissa_factors(rows, 4, SCALING, iterations=4, seed=5, reduce=reduce)
        return init_loftq_factors(
            rows, 4, SCALING, int_codec(4), iterations=3, seed=5, reduce=reduce
        )

    parts = run_ranks(ranks, find)
    ranks = 1
    whole = find(0, alone)
    for part in parts:
        torch.testing.assert_close(part.factors.A, whole.factors.A, rtol=0, atol=1e-6)
    joined = torch.cat([part.factors.B for part in parts])
    torch.testing.assert_close(joined, whole.factors.B, rtol=0, atol=1e-6)
    if whole.removed is not None:
        joined = torch.cat([part.removed.B for part in parts])
        torch.testing.assert_close(joined, whole.removed.B, rtol=0, atol=1e-6)
