import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_peft.adapters.low_rank.row_sharded import add_factor_product, compute_top_singular
from dist_peft.core.span import row_span
from dist_peft.core.world import World
from tests.support.dist import run_ranks as run_processes
from tests.support.matrices import decaying, dense_best
from tests.support.thread_ranks import run_ranks


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (9, 50), (50, 9)])
@pytest.mark.parametrize("rank", [1, 5, 9])
def test_equals_the_dense_svd(shape: tuple[int, int], rank: int) -> None:
    weight = decaying(*shape)
    top = compute_top_singular(weight, rank, iterations=6, seed=0, reduce=lambda t: t)
    torch.testing.assert_close(top.B @ top.A, dense_best(weight, rank), rtol=0, atol=1e-6)
    values = torch.linalg.svdvals(weight.double())[:rank]
    torch.testing.assert_close(top.A @ top.A.T, torch.diag(values), rtol=0, atol=1e-6)
    torch.testing.assert_close(top.B.T @ top.B, torch.diag(values), rtol=0, atol=1e-6)


def test_is_nearly_the_best_without_decay() -> None:
    weight = torch.randn(200, 150, generator=torch.Generator().manual_seed(2))
    best = (weight - dense_best(weight, 16)).norm()
    top = compute_top_singular(weight, 16, iterations=4, seed=0, reduce=lambda t: t)
    assert best <= (weight - top.B @ top.A).norm() <= 1.003 * best


@pytest.mark.parametrize("ranks", [2, 3, 7])
@pytest.mark.parametrize("out", [50, 5])
def test_any_number_of_ranks(out: int, ranks: int) -> None:
    weight = decaying(out, 30)
    alone = compute_top_singular(weight, 4, iterations=3, seed=9, reduce=lambda t: t)
    parts = run_ranks(
        ranks,
        lambda rank, reduce: compute_top_singular(
            weight[row_span(out, ranks, rank).slice], 4, iterations=3, seed=9, reduce=reduce
        ),
    )
    for part in parts:
        torch.testing.assert_close(part.A, alone.A, rtol=0, atol=1e-11)
    joined = torch.cat([part.B for part in parts])
    torch.testing.assert_close(joined, alone.B, rtol=0, atol=1e-11)


def test_sign_convention_and_seed() -> None:
    weight = decaying(30, 20)
    one = compute_top_singular(weight, 4, iterations=8, seed=1, reduce=lambda t: t)
    other = compute_top_singular(weight, 4, iterations=8, seed=2, reduce=lambda t: t)
    largest = one.A.gather(1, one.A.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    torch.testing.assert_close(one.A, other.A, rtol=0, atol=1e-6)
    negative = compute_top_singular(-weight, 4, iterations=8, seed=1, reduce=lambda t: t)
    torch.testing.assert_close(negative.A, one.A, rtol=0, atol=1e-9)
    torch.testing.assert_close(negative.B, -one.B, rtol=0, atol=1e-9)


def test_more_rank_than_the_matrix_has() -> None:
    weight = decaying(30, 20)[:, :1] * torch.ones(1, 20)
    top = compute_top_singular(weight, 3, iterations=2, seed=0, reduce=lambda t: t)
    torch.testing.assert_close((top.B @ top.A).float(), weight, rtol=0, atol=1e-6)
    assert torch.isfinite(top.A).all()
    assert top.A[1:].norm(dim=1).tolist() == pytest.approx([1, 1])
    zero = compute_top_singular(torch.zeros(5, 8), 2, iterations=2, seed=0, reduce=lambda t: t)
    assert zero.B.abs().max() == 0
    assert torch.isfinite(zero.A).all()


def test_only_in_times_k_is_summed() -> None:
    shapes = []

    def reduce(tensor: Tensor) -> Tensor:
        shapes.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    compute_top_singular(torch.randn(64, 40), 3, iterations=2, seed=0, reduce=reduce)
    assert shapes == [((40, 14), torch.float64)] * 3


def test_add_product_is_row_local() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, B = torch.randn(2500, 65, generator=generator), torch.randn(2500, 7, generator=generator)
    A = torch.randn(7, 65, generator=generator)
    whole = add_factor_product(rows, B, A, 0.3)
    reference = (rows.double() + 0.3 * B.double() @ A.double()).float()
    torch.testing.assert_close(whole, reference, rtol=1e-7, atol=1e-7)
    for start, stop in [(0, 1), (5, 5), (17, 1300), (2000, 2500)]:
        part = slice(start, stop)
        assert torch.equal(add_factor_product(rows[part], B[part], A, 0.3), whole[part])


def _work(world: World) -> list[list[float]]:
    def reduce(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    rows = decaying(11, 30)[row_span(11, world.size, world.rank).slice]
    return compute_top_singular(rows, 4, iterations=3, seed=9, reduce=reduce).A.tolist()


@pytest.mark.dist
def test_real_processes() -> None:
    alone = compute_top_singular(decaying(11, 30), 4, iterations=3, seed=9, reduce=lambda t: t).A
    first, second = run_processes(_work, 2)
    assert first == second
    found = torch.tensor(first, dtype=torch.float64)
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-11)
