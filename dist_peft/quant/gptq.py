"""GPTQ: codes that make the layer's output right, not each weight.

GPTQ (Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers") rounds the columns of a weight one after the other and lets the columns to come make
up for the error. The error is measured on inputs ``X`` of the layer from real text. With
``H = X^T X``, the error ``E = w' - w`` of a row costs ``E H E^T``. With the upper triangular ``U``
of ``H^-1 = U^T U``, at column ``i``::

    q_i   = round and clamp w_i with its group's scale and zero      w'_i = (q_i - zero) * scale
    w_j  -= (w_i - w'_i) * U_ij / U_ii        for all j > i

**Order.** A column rounded early has many others to make up for it, so important columns, those of
large ``H_ii``, come first. Groups must stay contiguous in the file (kernels, QA-LoRA). So whole
groups are ordered by their largest ``H_ii``, and columns inside each group by their own::

    columns     0 1 2 3 | 4 5 6 7 | 8 9 . .          groups of 4, the last one padded
    H_ii        1 9 2 2 | 5 1 1 7 | 3 4 - -
    solved      1 2 3 0 | 7 4 5 6 | 9 8 . .          9, 7, 4: the groups stay in their places

**Groups.** Scale and zero of a group (``AffineCodec.compute_scale_and_zero``: the range holds 0,
the scale
is fp16, the zero an integer) are taken when its first column is reached, from the weights as all
earlier columns have changed them. The original code takes them before the changes of the running
block of columns.

**Damping.** ``0.01 * mean(diag H)`` is added to the diagonal: columns that were never active then
simply round to nearest. Where ``H`` still has no Cholesky factor, 0.1 and 1 are tried.

**Sums.** ``HessianSum`` adds the Gram matrices of samples as 64-bit integers, a fixed-point form
whose
sum does not depend on the order. So it is the same bits however samples lie on ranks. (In floats
each number of ranks would give other last bits, and a code here and there would change.)

**Rows.** Given ``U``, rows are independent. ``solve_weight_rows`` touches them with elementwise,
correctly
rounded operations only, no matrix product: the packed row is a function of its weights and the
factor, bit for bit, whatever the number of rows, threads or ranks.

Memory: ``8 in^2`` bytes for the sum, ``24 in^2`` more while it is factored, ``4 in^2`` for ``U``.
Rows are solved in chunks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dist_peft.core.span import Span
from dist_peft.quant.affine import AffineCodec, AffineParts
from dist_peft.quant.fixed_point import FixedPointSum
from dist_peft.quant.packed_rows import check_float_weight

__all__ = [
    "HessianFactor",
    "HessianSum",
    "compute_gram",
    "compute_square_sums",
    "factorize_hessian",
    "find_largest_entry",
    "invert_to_upper",
    "iterate_row_chunks",
    "solve_weight_rows",
]

DAMPINGS = (0.01, 0.1, 1.0)
"""Added to the diagonal, in units of its mean, until there is a Cholesky factor."""

CHUNK_ELEMENTS = 2**20
"""Weights solved at a time on a CPU: a float32 temporary has 4 MiB."""

_DEVICE_ELEMENTS = 2**26
"""Weights solved at a time on a GPU, where a chunk costs thousands of kernel launches."""


# -- sums ----------------------------------------------------------------------------------------


def compute_gram(inputs: Tensor) -> Tensor:
    """``X^T X`` of one sample: ``[..., in]`` of any float type -> float32 ``[in, in]``."""
    rows = inputs.reshape(-1, inputs.shape[-1]).float()
    return rows.T @ rows


def compute_square_sums(inputs: Tensor) -> Tensor:
    """Diagonal of ``X^T X``: ``[..., in]`` of any float type -> float32 ``[in]``."""
    return inputs.reshape(-1, inputs.shape[-1]).float().square().sum(0)


def find_largest_entry(sample: Tensor) -> float:
    """Return the largest entry of a Gram matrix, which is on its diagonal, or of that diagonal.

    Infinite where an input was NaN or infinite.
    """
    largest = float((sample.diagonal() if sample.dim() == 2 else sample).max())
    return largest if math.isfinite(largest) else math.inf


class HessianSum(FixedPointSum):
    """A sum of Gram matrices in 64-bit fixed point, independent of the order of addition.

    Args:
        columns: in_features.
        first, samples: see ``FixedPointSum``.
        diagonal: the samples are the diagonals of Gram matrices, ``[in]``.
    """

    find_largest = staticmethod(find_largest_entry)

    def __init__(
        self,
        columns: int,
        first: float,
        samples: int,
        device: torch.device,
        *,
        diagonal: bool = False,
    ) -> None:
        shape = (columns,) if diagonal else (columns, columns)
        super().__init__(shape, first, samples, device)

    def mean_hessian(self) -> Tensor:
        """The sum as float64, up to a factor that GPTQ does not depend on."""
        return self.total.double()


# -- factor --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HessianFactor:
    """Inverse factor of a Hessian, as solving needs it.

    Attributes:
        order: long ``[padded]``, the columns in the order of solving; whole groups follow each
            other.
        upper: float32 ``[padded, padded]``, ``U_ij / U_ii`` in that order; ones on the diagonal.
    """

    order: Tensor
    upper: Tensor

    @classmethod
    def allocate_empty(cls, padded: int, device: torch.device) -> "HessianFactor":
        """Room for a factor that another rank has made."""
        order = torch.empty(padded, dtype=torch.long, device=device)
        return cls(order, torch.empty(padded, padded, device=device))


def factorize_hessian(hessian: Tensor, group_size: int) -> HessianFactor:
    """Order, damp and factor a Hessian.

    Args:
        hessian: float64 ``[in, in]``, symmetric, positive semidefinite.
        group_size: columns are padded to whole groups; a padded column touches no other.

    Raises:
        ValueError: no Cholesky factor, even with the strongest damping.
    """
    order = _order_groups(hessian.diagonal(), group_size)
    padding = len(order) - len(hessian)
    mean = float(hessian.diagonal().mean()) or 1.0
    backwards = order.flip(0)
    if padding:
        hessian = functional.pad(hessian, (0, padding, 0, padding))
    ordered = hessian[backwards.unsqueeze(1), backwards]
    del hessian
    upper = invert_to_upper(ordered, mean)
    del ordered
    upper /= upper.diagonal().clone().unsqueeze(1)
    return HessianFactor(order, upper.float().contiguous())


def invert_to_upper(backwards: Tensor, mean: float) -> Tensor:
    """Return ``U`` of ``H^-1 = U^T U``, upper triangular, with as little damping as it takes.

    Args:
        backwards: ``H``, float64 ``[n, n]``, rows and columns in reverse order; overwritten.
        mean: of its diagonal, the unit of the damping.

    Raises:
        ValueError: no Cholesky factor, even with the strongest damping.
    """
    # H = R R^T with R upper triangular (Cholesky from the last column on), so H^-1 = U^T U with
    # U = R^-1: one factorization and one triangular inverse, no inverse of H
    damping = 0.0
    for wanted in DAMPINGS:
        backwards.diagonal().add_((wanted - damping) * mean)
        damping = wanted
        lower, failed = torch.linalg.cholesky_ex(backwards)
        if not int(failed):
            break
    else:
        raise ValueError(f"the Hessian has no Cholesky factor, even with damping {damping:g}")
    backwards.zero_().diagonal().fill_(1)  # the identity, in memory that is there
    inverse: Tensor = torch.linalg.solve_triangular(lower, backwards, upper=False)
    del lower
    return inverse.flip(0, 1)


def _order_groups(diagonal: Tensor, group_size: int) -> Tensor:
    """Group-aware activation order (see the module). long ``[padded]``."""
    padded = functional.pad(diagonal, (0, -len(diagonal) % group_size), value=-1.0)
    groups = padded.view(-1, group_size)
    inside = groups.argsort(dim=1, descending=True, stable=True)
    across = groups.amax(dim=1).argsort(descending=True, stable=True)
    first = torch.arange(0, len(padded), group_size, device=diagonal.device).unsqueeze(1)
    return (inside + first)[across].flatten()


# -- rows ----------------------------------------------------------------------------------------


@torch.no_grad()
def solve_weight_rows(weight: Tensor, factor: HessianFactor, codec: AffineCodec) -> Tensor:
    """Quantize rows given the factor of their inputs' Hessian.

    Args:
        weight: float ``[rows, in]``; any rows of the layer, 0 allowed.
        factor: of ``factorize_hessian`` with the codec's group size.
        codec: bits, group size and layout.

    Returns:
        ``uint8 [rows, row_bytes]`` in the codec's layout, zeros integers.

    Raises:
        ValueError: no floating-point matrix, a value is NaN or infinite, or a group's range needs
            a scale beyond fp16.
    """
    check_float_weight(weight)
    rows, columns = weight.shape
    padded = len(factor.order)
    assert padded == -(-columns // codec.group_size) * codec.group_size, (padded, columns)
    packed = weight.new_empty(rows, codec.num_row_bytes(columns), dtype=torch.uint8)
    for span in iterate_row_chunks(rows, padded, weight.device):
        chunk = functional.pad(weight[span.slice].float(), (0, padded - columns))
        # column i of the weight is row i here: columns updated together are contiguous
        parts = _solve_chunk(chunk.T[factor.order], factor, codec, span.start)
        packed[span.slice] = codec.join_packed_rows(parts, columns)
    return packed


def iterate_row_chunks(rows: int, padded: int, device: torch.device) -> Iterator[Span]:
    """Yield spans of rows that are solved together."""
    elements = CHUNK_ELEMENTS if device.type == "cpu" else _DEVICE_ELEMENTS
    return Span(0, rows).split_into_chunks(max(1, elements // padded))


def _solve_chunk(
    columns: Tensor, factor: HessianFactor, codec: AffineCodec, first_row: int
) -> AffineParts:
    """float32 ``[padded, n]`` in the order of solving, overwritten -> parts of ``n`` rows."""
    padded, count = columns.shape
    size, groups = codec.group_size, padded // codec.group_size
    codes = torch.empty_like(columns, dtype=torch.uint8)
    scale = columns.new_empty(groups, count, dtype=torch.float16)
    zero = torch.empty_like(scale)
    change = torch.empty_like(columns)
    for start in range(0, padded, size):
        group = start // size
        own = columns[start : start + size].T.unsqueeze(1)
        scale[group], zero[group] = (
            p.squeeze(1) for p in codec.compute_scale_and_zero(own, first_row)
        )
        step, shift = scale[group].float(), zero[group].float()
        for i in range(start, start + size):
            code = (columns[i] / step).round_().add_(shift).clamp_(0, 2**codec.bits - 1)
            codes[i] = code
            error = columns[i] - (code - shift).mul_(step)
            if i + 1 < padded:
                # two roundings, not a fused one: the same bits on every machine
                after = change[i + 1 :]
                torch.mul(factor.upper[i, i + 1 :].unsqueeze(1), error, out=after)
                columns[i + 1 :] -= after
    place = torch.empty_like(factor.order)
    place[factor.order] = torch.arange(padded, device=place.device)
    solved = factor.order.view(groups, size)[:, 0] // size  # group -> its place in the row
    where = torch.empty_like(solved)
    where[solved] = torch.arange(groups, device=where.device)
    return AffineParts(codes[place].T.contiguous(), scale[where].T, zero[where].T)
