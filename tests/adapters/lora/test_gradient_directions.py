import pytest
import torch

from dist_peft.adapters.lora.gradient_directions import compute_gradient_factors
from tests.support.initializations import assert_same_factors, compute_paper_factors


@pytest.mark.parametrize("shape", [(24, 17), (17, 24)])
def test_equals_the_paper(shape: tuple[int, int]) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(3)).double()
    found = compute_gradient_factors(gradient, 5, 16.0, iterations=4, seed=0)
    assert_same_factors(found.A, found.B, compute_paper_factors(gradient, 5, 16.0), atol=1e-5)
    # of all scales the same start
    scaled = compute_gradient_factors(gradient * 2.0**-20, 5, 16.0, iterations=4, seed=0)
    assert torch.equal(scaled.A, found.A) and torch.equal(scaled.B, found.B)


def test_first_step_is_the_best_of_rank_2r() -> None:
    """Theorem 3.1: a small step of A and B moves the weight along the best fit of rank 2r."""
    gradient = torch.randn(20, 16, generator=torch.Generator().manual_seed(5)).double()
    start = compute_gradient_factors(gradient, 3, 16.0, iterations=4, seed=0)
    A, B = start.A.double(), start.B.double()
    moved = B @ (B.T @ gradient) + (gradient @ A.T) @ A
    U, S, V = torch.linalg.svd(gradient, full_matrices=False)
    best = (U[:, :6] * S[:6]) @ V[:6]
    direction = (moved * best).sum() / moved.norm() / best.norm()
    assert direction == pytest.approx(1.0, abs=1e-6)


def test_no_gradient() -> None:
    with pytest.raises(ValueError, match="no gradient"):
        compute_gradient_factors(torch.zeros(6, 6).double(), 2, 16.0, iterations=2, seed=0)
