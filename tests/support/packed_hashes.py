"""Hashes of packed bytes that hold on every machine."""

import functools
import hashlib

import torch
from torch import Tensor

from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.codec import Codec, RawCodec
from dist_peft.quant.gptq import HessianFactor, solve_weight_rows
from dist_peft.quant.nf4 import Nf4Codec


def fixed_weight(rows: int, columns: int) -> Tensor:
    """Values of a normal-like shape from integer arithmetic alone, so the same everywhere.

    Sums of four 16-bit numbers of a linear congruential sequence, scaled by powers of two.
    """
    return _make_fixed_weight(rows, columns).clone()


@functools.cache
def _make_fixed_weight(rows: int, columns: int) -> Tensor:
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
