"""Muon: momentum orthogonalized by Newton-Schulz iterations (Jordan et al. 2024).

For a matrix W with gradient G, momentum M and U S V^T the singular value decomposition of M::

    M <- mu M + (1 - mu) G
    W <- (1 - lr wd) W - lr max(1, rows / columns)^(1/2)  U V^T

``U V^T`` moves every direction of the matrix equally far, where Adam's step is dominated by a few,
and needs far fewer steps on small models. It is computed without an SVD, by five rounds of the
Newton-Schulz iteration ``X <- a X + b (X X^T) X + c (X X^T)^2 X`` from ``M / |M|``, whose
coefficients trade exactness for speed: singular values end in 0.7 to 1.2.
<https://kellerjordan.github.io/posts/muon/>

``torch.optim.Muon`` iterates in bfloat16, one matrix after the other, which on a CPU without
bfloat16 units takes longer than the training step itself. This implementation uses float32 and
batches matrices of one shape. It is for the matrices of hidden layers; optimize embeddings, norms
and biases with AdamW.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonalize_matrices"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for matrices only."""

    def __init__(
        self,
        matrices: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        assert all(p.dim() == 2 for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes.setdefault(matrix.shape, []).append(matrix)
            for (rows, columns), matrices in shapes.items():
                directions = [self._update_direction(m, group["momentum"]) for m in matrices]
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                for matrix, update in zip(
                    matrices, orthogonalize_matrices(torch.stack(directions)), strict=True
                ):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.sub_(update, alpha=rate)

    def _update_direction(self, matrix: Tensor, momentum: float) -> Tensor:
        state: dict[str, Any] = self.state[matrix]
        average = state.setdefault("average", torch.zeros_like(matrix))
        assert matrix.grad is not None
        average.lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(average, momentum)


def orthogonalize_matrices(matrices: Tensor) -> Tensor:
    """Approximate ``U V^T`` of each matrix [n, rows, columns], singular values in 0.7 to 1.2."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ROUNDS):
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    return x if wide else x.mT
