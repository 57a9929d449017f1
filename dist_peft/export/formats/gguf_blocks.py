"""Blocks of 32 weights as ggml stores them.

::

    Q4_1     20 bytes   fp16 d, fp16 m, 16 bytes    w = d q + m              byte j: codes j, j + 16
    Q8_0     34 bytes   fp16 d, 32 int8             w = d q                  d = max |w| / 127
    MXFP4    17 bytes   exponent, 16 bytes          w = 2^(e - 127) L[q]     byte j: codes j, j + 16

Codes and exponents of MXFP4 are those of the specification (``quant.mxfp4``), whose files have
codes 2 j and 2 j + 1 in byte j: they are moved, not rounded.
"""

import torch
from torch import Tensor

from dist_peft.core.errors import UserError
from dist_peft.export.formats.groups import BiasGroups
from dist_peft.quant.codec_defaults import AffineParts
from dist_peft.quant.mxfp4 import Mxfp4Codec
from dist_peft.quant.packed_rows import divide_exactly

__all__ = [
    "BLOCK",
    "pack_mxfp4_blocks",
    "pack_q4_1_blocks",
    "pack_q8_0_blocks",
    "pack_symmetric_codes",
]

BLOCK = 32
_MIDDLE = 128


def pack_mxfp4_blocks(packed: Tensor, columns: int) -> Tensor:
    """Rows of ``Mxfp4Codec``, ``uint8 [n, row_bytes]``, as ggml's: uint8 [n, in / 32 * 17]."""
    codes, exponents = Mxfp4Codec().split_packed_rows(packed, columns)
    pairs = codes.reshape(len(packed), -1, 2, BLOCK // 4)  # two halves of a block, 8 bytes each
    ordered = torch.stack((pairs & 15, pairs >> 4), -1).flatten(3)  # 16 codes of each half
    payload = ordered[:, :, 0] | ordered[:, :, 1] << 4
    return torch.cat((exponents.unsqueeze(-1), payload), -1).flatten(1)


def pack_q4_1_blocks(groups: BiasGroups) -> Tensor:
    """Pack groups of 32 codes below 16 with fp16 scale and bias to uint8 [rows, blocks * 20]."""
    rows, blocks = groups.scale.shape
    codes = groups.codes.reshape(rows, blocks, 2, 16)
    payload = codes[:, :, 0] | codes[:, :, 1] << 4
    ends = torch.stack((groups.scale, groups.bias), -1).half().view(torch.uint8)
    return torch.cat((ends, payload), -1).flatten(1)


def pack_symmetric_codes(parts: AffineParts, columns: int) -> Tensor:
    """Pack 8-bit codes whose zeros are 128 to Q8_0, uint8 [n, in / 32 * 34]; nothing is rounded.

    Raises:
        UserError: another zero.
    """
    if bool((parts.zero != _MIDDLE).any()):
        raise UserError(
            "gguf Q8_0 has no zeros, and the run has others than those of base.quant.solver: "
            "absmax (adapter.through_zeros trains them): use --type f16"
        )
    rows, groups = parts.scale.shape
    codes = (parts.codes ^ _MIDDLE)[:, :columns].reshape(rows, -1, BLOCK)  # as int8, less 128
    repeat = parts.codes.shape[1] // groups // BLOCK
    scale = parts.scale.repeat_interleave(repeat, 1)[:, : codes.shape[1], None].contiguous()
    return torch.cat((scale.view(torch.uint8), codes), -1).flatten(1)


def pack_q8_0_blocks(rows: Tensor) -> Tensor:
    """Quantize float32 [n, in] to Q8_0, uint8 [n, in / 32 * 34], rounded to nearest."""
    blocks = rows.reshape(rows.shape[0], -1, BLOCK)
    scale = divide_exactly(blocks.abs().amax(-1, keepdim=True), 127)
    codes = torch.where(scale > 0, blocks / scale, 0.0).round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat((scale.half().view(torch.uint8), codes.view(torch.uint8)), -1).flatten(1)
