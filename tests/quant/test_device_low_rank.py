"""Fused products with low-rank factors against torch: interpreted on a CPU, compiled on a GPU."""

import pytest
import torch
from torch import Tensor

from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout
from dist_peft.quant.low_rank_linear import LARGEST_RANK, DropoutKeys
from tests.support.device_rows import DEVICE, DTYPES, MARKS, has_same_bits, prepare_kernels

prepare_kernels()
from dist_peft.quant import device_low_rank as kernels  # noqa: E402

pytestmark = MARKS
# tokens, columns, rank; nothing divides a block
SHAPES = ((1, 1, 1), (70, 100, 5), (33, 65, 17), (2, 130, LARGEST_RANK))
CASES = [(shape, dtype, p) for shape in SHAPES for dtype in DTYPES for p in (0.0, 0.3)]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return numbers.to(DEVICE, dtype)


def make_dropout(p: float) -> SampleDropout:
    dropout = SampleDropout(p, "path", DropoutPosition(0))
    dropout.position.begin_micro_batch(5, torch.tensor([3]))
    return dropout


def make_keys(p: float, tokens: int, columns: int) -> DropoutKeys | None:
    return make_dropout(p).make_keys(torch.empty(tokens, columns, device=DEVICE))


def assert_rounded(found: Tensor, exact: Tensor, size: Tensor) -> None:
    """Equal to the float64 result but for float32 sums and one rounding; ``size`` bounds terms."""
    epsilon = torch.finfo(found.dtype).eps + 2e-6
    assert bool(((found.double() - exact).abs() <= epsilon * (size + exact.abs()) + 1e-9).all())


@pytest.mark.parametrize(("shape", "dtype", "p"), CASES, ids=str)
def test_products_are_those_of_the_dropped_rows(
    shape: tuple[int, int, int], dtype: torch.dtype, p: float
) -> None:
    tokens, columns, rank = shape
    x = draw(tokens, columns, seed=1, dtype=dtype)
    factor = draw(rank, columns, seed=2)
    keys, dropped = make_keys(p, tokens, columns), make_dropout(p)(x).double()
    rounded = factor.to(dtype).double()

    inner = kernels.project_rows(x, factor, 1.7, keys)
    size = 1.7 * dropped.abs() @ rounded.abs().T
    assert_rounded(inner, 1.7 * dropped @ rounded.T, size)
    across = factor.T.contiguous().T
    assert has_same_bits(kernels.project_rows(x, across, 1.7, keys), inner)

    y = draw(tokens, columns, seed=3, dtype=dtype)
    change = (inner.double() @ rounded).to(dtype)
    expected = y.double() + make_dropout(p)(change).double()
    size = y.abs().double() + inner.abs().double() @ rounded.abs() / (1 - p)
    assert_rounded(kernels.expand_rows(y, inner, factor.T, keys), expected, size)

    gradient = torch.empty(columns, rank, device=DEVICE)
    kernels.sum_outer(inner, x, gradient.T, keys)
    assert_rounded(gradient.T, inner.double().T @ dropped, inner.abs().double().T @ dropped.abs())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_elements_are_kept_and_rounded_alike(dtype: torch.dtype) -> None:
    x = draw(40, 70, seed=4, dtype=dtype)
    identity = torch.eye(70, device=DEVICE)
    keys = make_keys(0.3, 40, 70)
    found = kernels.project_rows(x, identity, 1.0, keys)
    assert torch.equal(found, make_dropout(0.3)(x))  # but for the sign of zeros
    zeros = torch.zeros_like(x)
    change = draw(40, 70, seed=5, dtype=dtype)
    found = kernels.expand_rows(zeros, change, identity, keys)
    assert torch.equal(found, make_dropout(0.3)(change))
    gradient = torch.empty(40, 70, device=DEVICE)
    kernels.sum_outer(torch.eye(40, dtype=dtype, device=DEVICE), x, gradient, keys)
    assert torch.equal(gradient, make_dropout(0.3)(x).float())


def test_rows_may_lie_apart() -> None:
    wide = draw(9, 50, seed=6)
    factor = draw(3, 20, seed=7)
    part = wide[:, 7:27]
    assert has_same_bits(
        kernels.project_rows(part, factor, 1.0), kernels.project_rows(part.clone(), factor, 1.0)
    )
    assert has_same_bits(
        kernels.project_rows(part.T.contiguous().T, factor, 1.0),
        kernels.project_rows(part.clone(), factor, 1.0),
    )


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_products_on_a_gpu(dtype: torch.dtype) -> None:
    test_products_are_those_of_the_dropped_rows((2048, 4096, 16), dtype, 0.05)
    x, factor = draw(2048, 4096, seed=8, dtype=dtype), draw(64, 4096, seed=9)
    once = kernels.project_rows(x, factor, 1.0)
    assert all(has_same_bits(kernels.project_rows(x, factor, 1.0), once) for _ in range(5))
