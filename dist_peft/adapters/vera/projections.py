"""VeRA's frozen projections: one pair of random matrices that all adapted linears share.

They are PEFT's (``VeraModel``): from one generator of PyTorch on the CPU, seeded by
``projection_prng_key``, first ``A`` then ``B``, each uniform in ``[-1, 1] * sqrt(6 / columns)``
(Kaiming)::

    A [r, largest in]      a linear uses its first columns
    B [largest out, r]     a linear uses its first rows

``B``'s draws follow ``A``'s, so a rank draws all of them: some 0.05 s and 28 MiB with ``r`` 256 on
the linears of an 8B Llama. They are on every rank, in no checkpoint, and not trained.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["SharedProjections", "draw_projections"]


def draw_projections(r: int, shapes: Iterable[tuple[int, int]], seed: int) -> tuple[Tensor, Tensor]:
    """Return ``A`` and ``B``, float32, for linears of ``shapes`` (``[out, in]``)."""
    sizes = list(shapes)
    rows, columns = max(out for out, _ in sizes), max(inputs for _, inputs in sizes)
    generator = torch.Generator().manual_seed(seed)
    pair = []
    for shape in ((r, columns), (rows, r)):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))  # rounded as PEFT does
        pair.append(torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator))
    return pair[0], pair[1]


class SharedProjections(nn.Module):
    """The pair, as buffers of one module that all layers have: engines move it once.

    Attributes:
        A, B: ``[r, largest in]``, ``[largest out, r]``, float32.
    """

    A: Tensor
    B: Tensor

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)
