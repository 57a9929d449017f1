"""Muon against a slow reference with a real SVD."""

import pytest
import torch

from dist_peft.quickstart.muon import Muon, orthogonalize_matrices


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for matrix, out in zip(matrices, orthogonalize_matrices(matrices), strict=True):
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        turned = u.T @ out @ vh.T
        assert torch.allclose(turned, torch.diag(turned.diag()), atol=1e-3)
        assert turned.diag().min() > 0.5
        assert turned.diag().max() < 1.3


def test_step_is_the_formula() -> None:
    weight = torch.nn.Parameter(torch.randn(12, 3, generator=torch.Generator().manual_seed(1)))
    start, gradient = weight.detach().clone(), torch.randn(12, 3)
    weight.grad = gradient.clone()
    Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    average = 0.1 * gradient
    direction = 0.1 * gradient + 0.9 * average
    update = orthogonalize_matrices(direction[None])[0]
    expected = start * (1 - 0.1 * 0.5) - 0.1 * 2.0 * update  # sqrt(12 / 3) = 2
    torch.testing.assert_close(weight.detach(), expected)
