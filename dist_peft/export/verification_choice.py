"""How an export is compared with the trained model: by its own library, or block by block.

The library is the better test, since users load the export with it, but it holds the whole model.
The choice is made before anything is written, from the headers of the base.
"""

import math
from pathlib import Path
from typing import Literal

import torch

from dist_peft.core.errors import UserError
from dist_peft.model.prequantized.base import open_prequantized
from dist_peft.store.index import SafetensorsIndex

__all__ = [
    "CONSUMER_SHARE",
    "AskedVerification",
    "Verification",
    "choose_verification",
    "count_loaded_bytes",
]

AskedVerification = Literal["auto", "consumer", "blocks"]
Verification = Literal["consumer", "blocks"]

CONSUMER_SHARE = 0.5
"""Share of the available memory up to which ``auto`` loads the whole model."""


def count_loaded_bytes(directory: Path, dtype: torch.dtype) -> int:
    """Return the size of a base that is loaded as ``dtype``, its packed weights dequantized.

    Args:
        directory: of the base's files, whose headers are read.
        dtype: type that a library computes in.

    Raises:
        UserError: damaged files.
    """
    index = SafetensorsIndex.open(directory)
    packed = open_prequantized(directory, index)
    if packed is None:
        return dtype.itemsize * sum(math.prod(info.shape) for info in index.tensors.values())
    plain = [info for info in packed.tensors.values() if info is not None]
    numbers = sum(math.prod(info.shape) for info in plain)
    mark, bits = packed.format.MARK, packed.quant_config.bits
    endings = (mark, *packed.format.OTHERS)
    stems = [name.removesuffix(mark) for name in index.tensors if name.endswith(mark)]
    parts = ([index.tensors.get(stem + ending) for ending in endings] for stem in stems)
    codes = sum(max(part.num_bytes for part in own if part) for own in parts)  # the largest part
    return dtype.itemsize * (numbers + codes * 8 // bits)


def choose_verification(
    asked: AskedVerification,
    needed: int,
    available: int,
    *,
    library: str,
    has_blocks: bool,
) -> Verification:
    """Return how to compare, within the host's memory.

    Args:
        asked: ``auto`` is the library where the model takes at most ``CONSUMER_SHARE`` of
            ``available``, or where there is no other way.
        needed: bytes of the loaded model.
        available: bytes of host memory.
        library: that loads the format, for messages.
        has_blocks: the format can be compared block by block.

    Raises:
        UserError: the memory is too small for it, or the format cannot be compared so.
    """
    if asked == "blocks" and not has_blocks:
        raise UserError(
            f"--verify blocks: this form is compared by {library} only; leave the option out, or "
            "pass --no-verify"
        )
    if asked == "blocks" or (
        asked == "auto" and has_blocks and needed > CONSUMER_SHARE * available
    ):
        return "blocks"
    if needed > available:
        other = "--verify blocks, which reads" if has_blocks else "--no-verify, which loads"
        rest = "a block at a time" if has_blocks else "nothing"
        raise UserError(
            f"comparing the result with the trained model loads it whole with {library}: about "
            f"{needed / 2**30:.1f} GiB, of which {available / 2**30:.1f} GiB are available on this "
            f"host; pass {other} {rest}, or use a host with more memory"
        )
    return "consumer"
