"""Packed weights decode to the same bits on this device as on the CPU, at odd sizes too.

Every codec and type, blocks that do not divide the columns included, encoded on both devices and
decoded on both.
"""

import itertools
from typing import Any

import torch
from gpu_common import finish, parse_arguments, pick_device

from dist_peft.core.config.run import QuantConfig
from dist_peft.quant.codec import make_codec

CODECS = [
    QuantConfig(kind="nf4", double_quant=False),
    QuantConfig(kind="nf4", double_quant=True),
    QuantConfig(kind="nf4", group_size=32),
    *(QuantConfig(kind="int", bits=bits, group_size=64) for bits in (2, 3, 4, 8)),
    *(QuantConfig(kind="mxfp4"), QuantConfig(kind="nvfp4")),
    *(QuantConfig(kind="fp8", group_size=size) for size in (128, 2**16)),
]
SHAPES = ((1, 64), (3, 4096), (129, 1024), (65, 172), (7, 14336), (1000, 2816))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def main() -> None:
    args = parse_arguments(__doc__)
    device = pick_device(args)
    shapes = SHAPES[:4] if args.dry_run else SHAPES
    compared: list[dict[str, Any]] = []
    failures: list[str] = []
    generator = torch.Generator().manual_seed(0)
    for quant, (rows, columns), dtype in itertools.product(CODECS, shapes, DTYPES):
        codec = make_codec(quant, dtype)
        weight = torch.randn(rows, columns, generator=generator).to(dtype)
        here = codec.quantize_to_packed(weight)
        there = codec.quantize_to_packed(weight.to(device)).cpu()
        decoded = codec.dequantize_rows(here, columns, dtype)
        found = codec.dequantize_rows(here.to(device), columns, dtype).cpu()
        name = f"{quant.kind}{quant.bits} in {quant.group_size}, {rows} x {columns}, {dtype}"
        state = {
            "encode": torch.equal(here, there),
            "decode": torch.equal(decoded, found),
            "largest_error": float((decoded.double() - found.double()).abs().max()),
        }
        compared.append({"case": name, **state})
        failures += [f"{name}: {what} differs" for what in ("encode", "decode") if not state[what]]
    finish("decode", args, {"compared": compared}, failures)


if __name__ == "__main__":
    main()
