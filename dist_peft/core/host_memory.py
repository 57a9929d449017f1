"""Return freed host memory to the system while a model is loaded (``M_MMAP_THRESHOLD``).

glibc serves large blocks by ``mmap`` and returns them to the system when they are freed, but its
threshold for "large" rises with the largest block freed so far, up to 32 MiB. While a model is
loaded, rows that were read and temporaries of the encoder then land in the heap between packed rows
that stay, and cannot be returned: the resident memory of a rank was measured at twice its share.
Holding the threshold down during the load fixes that; afterwards it is set to its maximum,
since a training step's temporaries are better reused than mapped again.

A mapped block costs a page fault for every 4 KiB each time it is allocated: with temporaries of
4 MiB above the threshold, two thirds of the time of encoding were faults. So the temporaries of
codecs (``quant.packed_rows``) are below it, and the rows that are read above.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["return_freed_memory"]

_M_MMAP_THRESHOLD = -3  # malloc.h
_LOADING, _OTHERWISE = 1024 * 1024, 32 * 1024 * 1024  # the latter is glibc's upper limit


@contextmanager
def return_freed_memory() -> Iterator[None]:
    """Return blocks from 1 MiB on to the system when they are freed; a no-op without glibc."""
    _set_mmap_threshold(_LOADING)
    try:
        yield
    finally:
        _set_mmap_threshold(_OTHERWISE)


def _set_mmap_threshold(size: int) -> None:
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library, such as musl
        return
    mallopt(_M_MMAP_THRESHOLD, size)
