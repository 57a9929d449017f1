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

from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.codec import Codec, RawCodec
from dist_peft.quant.exact_math import exact_sqrt
from dist_peft.quant.gptq import HessianFactor, solve_weight_rows
from dist_peft.quant.nf4 import Nf4Codec


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


def fixed_weight(rows: int, columns: int) -> Tensor:
    """Values of a normal-like shape from integer arithmetic alone, so the same everywhere.

    Sums of four 16-bit numbers of a linear congruential sequence, scaled by powers of two.
    """
    number = torch.arange(rows * columns * 4, dtype=torch.int64)
    for _ in range(3):
        number = (number * 1103515245 + 12345) % 2**31
        number ^= number >> 13
    quarters = (number % 2**16).view(rows, columns, 4).sum(-1) - 2**17
    scale = torch.exp2((torch.arange(rows) % 7).float() - 20).unsqueeze(1)  # exact powers of two
    return quarters.float() * scale


def packed_bytes(name: str, weight: Tensor) -> Tensor:
    """``weight`` encoded by the codec called ``name``."""
    codecs: dict[str, Codec] = {
        "nf4": Nf4Codec(64, double_quant=True),
        "nf4 blocks of 24": Nf4Codec(24, double_quant=True),
        "nf4 single": Nf4Codec(64, double_quant=False),
        "bfloat16": RawCodec(torch.bfloat16),
        **{f"int{bits}": AffineCodec(bits, 32) for bits in (8, 4, 3, 2)},
        **{f"int{bits} hqq": AffineCodec(bits, 32, "hqq") for bits in (8, 4, 3, 2)},
    }
    if name == "int3 gptq":
        columns = weight.shape[1]
        upper = torch.eye(columns) + fixed_weight(columns, columns).triu(1) / 2**12
        order = torch.arange(columns).flip(0)
        return solve_weight_rows(weight, HessianFactor(order, upper), AffineCodec(3, 32))
    return codecs[name].quantize_to_packed(weight)


HASHES = {
    "nf4": "720ad9b195ab8632",
    "nf4 blocks of 24": "fa86ddb3aaedac18",
    "nf4 single": "1d42f9f8b27f2daf",
    "bfloat16": "04236164762f9016",
    "int8": "1dca4662e33b770f",
    "int4": "af1fac1288bf0f60",
    "int3": "06f53d9668f46228",
    "int2": "93cc352540c2172a",
    "int8 hqq": "9d0602274c073a4c",
    "int4 hqq": "7d2c7b4c190ed526",
    "int3 hqq": "11b9c7e26cc044f2",
    "int2 hqq": "f4929ed7c3b95716",
    "int3 gptq": "1816f3333dd837eb",
}


def hash_of(name: str) -> str:
    digest = hashlib.sha256()
    for rows, columns in ((5, 96), (37, 1056), (64, 2048)):
        digest.update(packed_bytes(name, fixed_weight(rows, columns)).numpy().tobytes())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", HASHES)
def test_packed_bytes_are_those_of_every_machine(name: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert hash_of(name) == HASHES[name]
    finally:
        torch.set_num_threads(before)


def test_packed_bytes_of_a_fresh_process_on_two_threads() -> None:
    """The first call of a maths library in a process may take another way than later ones."""
    code = (
        "import torch; torch.set_num_threads(2)\n"
        "from tests.quant.test_exact_math import hash_of, HASHES\n"
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
