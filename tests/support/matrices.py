"""Matrices of known singular values, and their best approximations."""

import torch
from torch import Tensor


def decaying(out: int, features: int, ratio: float = 0.7) -> Tensor:
    """A matrix whose singular values fall geometrically."""
    generator = torch.Generator().manual_seed(1)
    small = min(out, features)
    left = torch.linalg.qr(torch.randn(out, small, generator=generator, dtype=torch.float64)).Q
    right = torch.randn(features, small, generator=generator, dtype=torch.float64)
    return (left * ratio ** torch.arange(small) @ torch.linalg.qr(right).Q.T).float()


def dense_best(weight: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]
