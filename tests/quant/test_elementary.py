"""Bytes that every machine and number of threads must give, by stored hashes."""

import hashlib
import math
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.elementary import square_root
from dist_peft.quant.gptq import Factor, solve_rows
from dist_peft.quant.nf4 import Nf4Codec


@pytest.fixture(params=[1, 2], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def exact_weight(rows: int, columns: int) -> Tensor:
    """Integers times powers of two, so the same bits everywhere; blocks of very unlike sizes."""
    count = torch.arange(rows * columns, dtype=torch.int64)
    numbers = (count * 7919 + count // 64 * 104729) % 65521 - 32760
    exponents = -12 - (count // 64 * 31 % 11)
    return torch.ldexp(numbers.double(), exponents).float().view(rows, columns)


def exact_factor(columns: int, group_size: int) -> Factor:
    """Groups in another order, and an upper triangle of multiples of 1/64."""
    groups = torch.arange(columns).view(-1, group_size).flip(0)
    place = torch.arange(columns)
    upper = ((place[:, None] * 37 + place * 11) % 31 - 15).float() / 64
    return Factor(groups.flatten(), upper.triu(1) + torch.eye(columns))


ENCODINGS = {
    "nf4 double": lambda w: Nf4Codec(64).encode(w),
    "nf4 single": lambda w: Nf4Codec(64, double_quant=False).encode(w),
    "int8": lambda w: AffineCodec(8, 64).encode(w),
    "int4": lambda w: AffineCodec(4, 64).encode(w),
    "int3": lambda w: AffineCodec(3, 64).encode(w),
    "int2": lambda w: AffineCodec(2, 32).encode(w),
    "hqq4": lambda w: AffineCodec(4, 64, "hqq").encode(w),
    "hqq2": lambda w: AffineCodec(2, 64, "hqq").encode(w),
    "gptq4": lambda w: solve_rows(w[:8, :256], exact_factor(256, 64), AffineCodec(4, 64)),
}
HASHES = {
    "nf4 double": "b0733dfd50523620e9b374e1c111e83c",
    "nf4 single": "490a85b72511e89f4c1b8010b24fdc38",
    "int8": "05d978b7732e9f22c1540277fe75a35d",
    "int4": "665abc36aa109672d6ffc1ca02084288",
    "int3": "9d95a209abc173747471b1303f0a4a16",
    "int2": "1dcc89f454ccc7288d4dad7f2a96050e",
    "hqq4": "630ced4fff89693fc3cb2dbe9b5725e6",
    "hqq2": "f91bd17aaf8034905cf727bdc01b13b0",
    "gptq4": "8cab6f5342407745fce5d4a55a600e5f",
}


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.usefixtures("threads")
def test_bytes_are_the_same_everywhere(name: str) -> None:
    packed = ENCODINGS[name](exact_weight(96, 4096))
    assert hashlib.sha256(packed.numpy().tobytes()).hexdigest()[:32] == HASHES[name]


def is_correctly_rounded(number: float, root: float) -> bool:
    """Whether no float32 is nearer to the exact root, in rational numbers."""
    below, above = (
        float(torch.tensor(root).nextafter(torch.tensor(end))) for end in (-math.inf, math.inf)
    )
    low, high = ((Fraction(root) + Fraction(other)) / 2 for other in (below, above))
    return low * low <= Fraction(number) <= high * high


@pytest.mark.usefixtures("threads")
def test_roots_are_correctly_rounded() -> None:
    """Enough of them at a time that torch would take its vector library."""
    numbers = exact_weight(64, 4096).abs()
    numbers[0, :4] = torch.tensor([0.0, 1e-45, 3e-39, torch.finfo(torch.float32).max])
    roots = square_root(numbers)
    pairs = list(zip(numbers.flatten().tolist(), roots.flatten().tolist(), strict=True))
    assert all(is_correctly_rounded(number, root) for number, root in pairs[:3000] if number)
    assert roots[0, 0] == 0


def test_shapes_and_types() -> None:
    assert square_root(torch.tensor(2.25)).shape == ()
    assert square_root(torch.empty(0, 3)).shape == (0, 3)
    wide = torch.arange(12, dtype=torch.float64).view(3, 4)
    assert torch.equal(square_root(wide.T**2), wide.T)
    assert square_root(wide).dtype == torch.float64
