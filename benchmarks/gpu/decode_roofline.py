"""Time and bandwidth of encoding and decoding one weight, by each way that this device has.

For each codec and way: milliseconds, bytes a weight that have to be read and written, and the share
of the bandwidth that a plain copy reaches on the same device. A fused decode that is bound by
memory has a share near 1; the ways differ in time only, as their bits are equal (step ``decode``).
"""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from common import print_table
from gpu_common import finish, parse_arguments, pick_device

from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.codec import Codec
from dist_peft.quant.fp8 import Fp8Codec
from dist_peft.quant.mxfp4 import Mxfp4Codec
from dist_peft.quant.nf4 import Nf4Codec
from dist_peft.quant.nvfp4 import Nvfp4Codec

CODECS: list[Codec] = [
    *(Nf4Codec(64), Nf4Codec(64, False)),
    *(AffineCodec(bits, 64) for bits in (8, 4, 3, 2)),
    *(Mxfp4Codec(), Nvfp4Codec(), Fp8Codec(128)),
]
SHAPE, DRY_SHAPE = (14336, 4096), (16, 512)
WAYS = ("triton", "bnb", "torch")
ROUNDS = 20


def time_call(call: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Median seconds of a call that is queued alone."""
    seconds = []
    for number in range(rounds + 3):  # the first ones compile and warm up
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        before = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= 3:
            seconds.append(time.perf_counter() - before)
    return sorted(seconds)[len(seconds) // 2]


def measure_copy(device: torch.device, num_bytes: int, rounds: int) -> float:
    """Bytes a second, read and written, of a copy of this size."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / time_call(lambda: target.copy_(source), device, rounds)


def list_ways(codec: Codec, device: torch.device) -> list[str]:
    """Ways that this codec has here: bitsandbytes knows NF4 alone, a CPU is torch."""
    if device.type == "cpu":
        return ["torch"]
    return [way for way in WAYS if way != "bnb" or isinstance(codec, Nf4Codec)]


def measure_codec(
    codec: Codec, weight: torch.Tensor, rounds: int, copied: float
) -> dict[str, float]:
    """Times of one codec by the way that the environment says; ``copied`` bytes a second."""
    device, columns = weight.device, weight.shape[1]
    packed = codec.quantize_to_packed(weight)
    encode = time_call(lambda: codec.quantize_to_packed(weight), device, 3)
    decode = time_call(
        lambda: codec.dequantize_rows(packed, columns, torch.bfloat16), device, rounds
    )
    moved = packed.nbytes + weight.nbytes
    return {
        "decode_ms": 1e3 * decode,
        "encode_ms": 1e3 * encode,
        "bytes_a_weight": moved / weight.numel(),
        "share_of_copy": moved / decode / copied,
    }


def main() -> None:
    args = parse_arguments(__doc__)
    device = pick_device(args)
    rounds = 2 if args.dry_run else ROUNDS
    rows, columns = DRY_SHAPE if args.dry_run else SHAPE
    weights = rows * columns
    copied = measure_copy(device, 2 * weights, rounds)
    weight = torch.randn(rows, columns, device=device, dtype=torch.bfloat16) * 0.02
    measured: list[dict[str, Any]] = []
    failures: list[str] = []
    for codec in CODECS:
        for way in list_ways(codec, device):
            os.environ["DIST_PEFT_KERNELS"] = way
            name = f"{codec.name}{'' if getattr(codec, 'double_quant', True) else ', single'} {way}"
            try:
                measured.append({"case": name, **measure_codec(codec, weight, rounds, copied)})
            except Exception as error:  # the other ways are measured all the same
                failures.append(f"{name}: {error}")
    os.environ.pop("DIST_PEFT_KERNELS", None)
    header = ["case", "decode ms", "encode ms", "bytes a weight", "share of a copy"]
    print_table(
        header,
        [[m["case"], *(f"{m[key]:.3f}" for key in list(m) if key != "case")] for m in measured],
    )
    finish("roofline", args, {"copy_bytes_s": copied, "measured": measured}, failures)


if __name__ == "__main__":
    main()
