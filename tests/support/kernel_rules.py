"""Rules that a run on a CPU cannot see, for each fused kernel as it is launched.

    python -m tests.support.kernel_rules           fails with the kernel and the rule
    python -m tests.support.kernel_rules --table   registers, loads and stores of each kernel, and
                                                   launches of a decode by torch's operators

For sm_80, sm_90 and sm_100: compiles, at most 64 registers a thread, nothing
spilled to local memory; no fused multiply-add (but in the sums of products), no approximate or
flushing instruction, no float64; the number of launches. No GPU and no driver are needed.
"""

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dist_peft.quant import device, device_encode, device_low_rank, packed_rows
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.fp8 import Fp8Codec
from dist_peft.quant.low_rank_linear import DropoutKeys
from dist_peft.quant.mxfp4 import Mxfp4Codec
from dist_peft.quant.nf4 import Nf4Codec
from dist_peft.quant.nvfp4 import Nvfp4Codec
from tests.support.device_rows import KernelCodec, describe_rows
from tests.support.triton_launches import compile_launches, list_instructions, read_resources

CAPABILITIES = (80, 90, 100)
MAX_REGISTERS = 64
BANNED = ("div.full", "approx", ".ftz", "f64")
CONTRACTED = "fma.rn.f32"
CODECS = [Nf4Codec(64), Nf4Codec(64, False), *(AffineCodec(bits, 64) for bits in (2, 3, 4, 8))]
FLOAT_CODECS: list[KernelCodec] = [Mxfp4Codec(), Nvfp4Codec(), Fp8Codec(128)]
"""Decoded by a kernel, encoded by torch."""


def list_decodes(capability: int) -> Iterator[tuple[str, list[Any]]]:
    """Each codec into bfloat16 at an even width; for sm_90 also odd widths, types, alignments."""
    odd = ((4097, torch.float32, 0), (1, torch.float16, 0), (4096, torch.bfloat16, 1))
    for number, codec in enumerate([*CODECS, *FLOAT_CODECS]):
        cases = [(4096, torch.bfloat16, 0), odd[number % len(odd)]]
        for columns, dtype, shift in cases if capability == 90 else cases[:1]:
            layout = describe_rows(codec, columns)
            wide = torch.zeros(2, layout.row_bytes + 4 * shift + shift, dtype=torch.uint8)
            packed = wide[:, shift : shift + layout.row_bytes]
            with compile_launches(capability) as compiled:
                device.dequantize_rows(packed, layout, columns, dtype)
            assert len(compiled) == 1, f"{len(compiled)} launches of a decode of {codec}"
            yield f"decode {codec.name} runs {layout.runs} {columns} {dtype} +{shift}", compiled


def list_encodes(capability: int) -> Iterator[tuple[str, list[Any]]]:
    """All codecs for sm_90, one of each kind for the others."""
    codecs = [*CODECS, Nf4Codec(24), AffineCodec(3, 4096)]
    for codec in codecs if capability == 90 else (CODECS[0], CODECS[4]):
        weight = torch.zeros(2, 4096, dtype=torch.bfloat16)
        layout = describe_rows(codec, 4096)
        with compile_launches(capability) as compiled:
            if layout.kind == "nf4":
                device_encode.quantize_nf4_rows(weight, layout)
            else:
                device_encode.quantize_affine_rows(weight, layout)
        expected = 2 if layout.runs else 1
        assert len(compiled) == expected, f"{len(compiled)} launches of an encode of {codec}"
        yield f"encode {codec.name} runs {layout.runs} group {codec.group_size}", compiled


def list_products(capability: int) -> Iterator[tuple[str, list[Any]]]:
    """bfloat16 with dropout at the usual rank; also without it, and the largest ranks."""
    cases = [(torch.bfloat16, 16, True)]
    if capability == 90:
        cases += [(torch.bfloat16, 16, False), (torch.float16, 128, True)]
    else:
        cases += [(torch.bfloat16, 64 if capability == 100 else 128, True)]
    for dtype, rank, drops in cases:
        x, A = torch.zeros(64, 4096, dtype=dtype), torch.zeros(rank, 4096)
        a, b = torch.zeros(64, 1, dtype=torch.int32), torch.zeros(4096, dtype=torch.int32)
        keys = DropoutKeys(a, a, b, b, -(2**31) + 12345, 0.95) if drops else None
        inner = torch.zeros(64, rank, dtype=dtype)
        with compile_launches(capability) as compiled:
            device_low_rank.project_rows(x, A, 2.0, keys)
            device_low_rank.expand_rows(x, inner, A.T, keys)
            device_low_rank.sum_outer(inner, x, torch.empty_like(A), keys)
        assert len(compiled) == 3, f"{len(compiled)} launches of three products"
        yield f"product {dtype} rank {rank} dropout {drops}", compiled


class _CountedCalls(TorchDispatchMode):
    """Calls of operators, and those that compute: neither views nor allocations."""

    calls = launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        alias = func._schema.returns[0].alias_info
        self.calls += 1
        self.launches += "empty" not in str(func) and (alias is None or alias.is_write)
        return func(*args, **kwargs or {})


def print_torch_launches() -> None:
    """Of a weight of 4096 x 4096 into bfloat16, in the chunks of a GPU."""
    of_a_gpu = packed_rows._DEVICE_CHUNK_ELEMENTS
    with mock.patch.object(packed_rows, "CHUNK_ELEMENTS", of_a_gpu):
        for codec in [*CODECS, *FLOAT_CODECS]:
            packed = torch.zeros(4096, codec.num_row_bytes(4096), dtype=torch.uint8)
            codec.dequantize_rows(packed[:1], 4096, torch.bfloat16)  # builds its tables
            with _CountedCalls() as counted:
                codec.dequantize_rows(packed, 4096, torch.bfloat16)
            print(f"torch decode {codec.name}: {counted.calls} calls, {counted.launches} launches")


def check_kernel(name: str, kernel: Any) -> dict[str, int]:
    used, text = read_resources(kernel), kernel.asm["ptx"]
    is_product = " product " in name
    assert used["REG"] <= MAX_REGISTERS, f"{name}: {used['REG']} registers"
    assert used["LOCAL"] == 0, f"{name}: {used['LOCAL']} bytes spilled"
    for instruction in BANNED if is_product else (*BANNED, CONTRACTED):
        assert instruction not in text, f"{name}: {instruction}"
    return used


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", action="store_true")
    table = parser.parse_args().table
    assert "TRITON_INTERPRET" not in os.environ, "an interpreted kernel is not compiled"
    count = 0
    for capability in CAPABILITIES:
        for listed in (list_decodes, list_encodes, list_products):
            for case, compiled in listed(capability):
                for kernel in compiled:
                    name = f"sm_{capability} {case} {kernel.metadata.name}"
                    used, count = check_kernel(name, kernel), count + 1
                    if table:
                        found = Counter(list_instructions(kernel))
                        moves = {i: n for i, n in found.items() if i[:3] in ("LDG", "STG", "LDS")}
                        print(name, used, found.total(), moves)
    if table:
        print_torch_launches()
    print(f"{count} kernels keep the rules")


if __name__ == "__main__":
    main()
