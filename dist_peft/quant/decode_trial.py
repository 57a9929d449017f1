"""Which of two ways to decode NF4 is used on this processor: a trial of both.

bitsandbytes' CPU operator is a compiled loop, up to four times faster than a table look-up where it
has vector instructions for the type, and slower where it has none. It has also had wrong results
for some shapes on some processors. So it is tried: on shapes that are odd in every respect it must
return the same bits, and it must be faster by a margin that noise does not reach.

The trial runs in a thread of its own, since modes of torch (fake tensors, devices) are a thread's.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["Decode", "is_equal_and_faster"]

Decode = Callable[[Tensor, Tensor], Tensor]
"""Payload ``uint8 [rows, blocks * group_size / 2]`` and absmax ``float32 [rows, blocks]`` ->
weight."""

_MARGIN = 1.2
"""How much faster the other way must be."""

_SHAPES = ((1, 1), (1, 7), (3, 1), (5, 3), (33, 16), (2, 70), (257, 2))
"""Rows and blocks that both decode."""

_TIMED_WEIGHTS = 2**19


def is_equal_and_faster(other: Decode, usual: Decode, group_size: int) -> bool:
    """Return whether ``other`` gives the bits of ``usual``, in less CPU time.

    Args:
        other, usual: ways to decode NF4 on the CPU.
        group_size: weights of a block.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_try_both, other, usual, group_size).result()


@torch.no_grad()
def _try_both(other: Decode, usual: Decode, group_size: int) -> bool:
    for rows, blocks in _SHAPES:
        example = _make_example(rows, blocks, group_size)
        one, two = usual(*example), other(*example)
        if one.shape != two.shape or not torch.equal(one.view(torch.uint8), two.view(torch.uint8)):
            return False
    timed = _make_example(_TIMED_WEIGHTS // 1024, max(1, 1024 // group_size), group_size)
    seconds: list[list[float]] = [[], []]
    for _ in range(6):  # in turn; the first run of each is a warm-up
        for decode, found in zip((usual, other), seconds, strict=True):
            before = time.thread_time()
            decode(*timed)
            found.append(time.thread_time() - before)
    usual_best, other_best = (min(found[1:]) for found in seconds)
    return _MARGIN * other_best < usual_best


def _make_example(rows: int, blocks: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Payload with all bytes, and scales from those of half precision's subnormals to large ones,
    and 0."""
    size = blocks * group_size // 2
    payload = torch.arange(rows * size, device="cpu").mul_(37).remainder_(256).to(torch.uint8)
    scales = torch.arange(rows * blocks, dtype=torch.float64, device="cpu").mul_(0.37)
    absmax = torch.pow(10.0, scales.remainder_(13.0).sub_(8.0)).float()
    absmax[::11] = 0
    return payload.view(rows, size), absmax.view(rows, blocks)
