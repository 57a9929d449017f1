"""The device that a traced program is planned for, while its tensors are fake ones on the CPU.

Code that takes another way on another device, or whose work depends on values, asks here::

    list_row_chunks       the chunks of the assumed device, and of them the first alone: a loop
                          needs as much memory in its first turn as in any later one
    has_fast_product      products are native but on a CPU
    choose_nf4_kernel     bitsandbytes' on CUDA, if it is installed
    chunks of logits      of the assumed device's size
    panels of a packed    of the assumed device's size, and the first alone
    head
    RowGroups             equal shares: fake counts have no values
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["assume_device", "get_assumed_device"]

_assumed: torch.device | None = None
"""Of the process: the threads of a backward pass see it too."""


@contextmanager
def assume_device(device: torch.device) -> Iterator[None]:
    """Trace for ``device`` inside."""
    global _assumed
    outer, _assumed = _assumed, device
    try:
        yield
    finally:
        _assumed = outer


def get_assumed_device() -> torch.device | None:
    """Return the device that is planned for; None where tensors are what they seem."""
    return _assumed
