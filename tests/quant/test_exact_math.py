"""Square roots are correctly rounded, and packed bytes are the same ones on every machine."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dist_peft.quant.exact_math import exact_sqrt
from tests.support.packed_hashes import HASHES, fixed_weight, hash_of, packed_bytes


def is_rounded_correctly(root: Tensor, value: Tensor) -> Tensor:
    """Whether each float32 ``root`` is the nearest one to the square root of ``value``.

    In float64 the squares of the neighbouring midpoints are exact enough to decide, since a
    float32 has 24 bits and a midpoint 25: its square has 50 and float64 holds 53.
    """
    wide = root.double()
    below = (wide + root.nextafter(torch.tensor(0.0)).double()) / 2
    above = (wide + root.nextafter(torch.tensor(torch.inf)).double()) / 2
    return (below**2 <= value.double()) & (value.double() <= above**2)


def test_square_roots_are_correctly_rounded() -> None:
    bits = torch.arange(0, 2**31 - 2**23, 1021, dtype=torch.int64).int()  # up to infinity
    values = bits.view(torch.float32)
    assert is_rounded_correctly(exact_sqrt(values), values).all()
    assert exact_sqrt(torch.tensor([0.0, 4.0, torch.inf])).tolist() == [0.0, 2.0, torch.inf]


@given(st.floats(0, width=32, allow_infinity=False), st.integers(1, 40))
def test_a_root_does_not_depend_on_its_place(value: float, width: int) -> None:
    """Vector and scalar code agree."""
    alone = exact_sqrt(torch.tensor(value, dtype=torch.float32))
    many = exact_sqrt(torch.full((3, width), value)[:, ::2])
    assert torch.equal(many, alone.expand_as(many))
    assert alone.dtype == torch.float32 and alone == np.sqrt(np.float32(value))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", HASHES)
def test_packed_bytes_are_those_of_every_machine(name: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert hash_of(name) == HASHES[name]
    finally:
        torch.set_num_threads(before)


@pytest.mark.e2e
def test_packed_bytes_of_a_fresh_process_on_two_threads() -> None:
    """The first call of a maths library in a process may take another way than later ones."""
    code = (
        "import torch; torch.set_num_threads(2)\n"
        "from tests.support.packed_hashes import hash_of, HASHES\n"
        "assert {n: hash_of(n) for n in ('nf4', 'int3 hqq')} == "
        "{n: HASHES[n] for n in ('nf4', 'int3 hqq')}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", [name for name in HASHES if "gptq" not in name])
def test_packed_bytes_of_a_gpu(name: str) -> None:
    """But for gptq, whose factor is made on the CPU here."""
    digest = hashlib.sha256()
    for rows, columns in ((5, 96), (37, 1056), (64, 2048)):
        packed = packed_bytes(name, fixed_weight(rows, columns).cuda())
        digest.update(packed.cpu().numpy().tobytes())
    assert digest.hexdigest()[:16] == HASHES[name]
