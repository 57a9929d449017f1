"""Host memory: how much is available, and whether freed blocks are returned to the system.

glibc serves large blocks by ``mmap`` and returns them to the system when they are freed, but its
threshold for "large" rises with the largest block freed so far, up to 32 MiB. While a model is
loaded, rows that were read and temporaries of the encoder then land in the heap between packed rows
that stay, and cannot be returned: the resident memory of a rank was measured at twice its share.
Holding the threshold down during the load fixes that; afterwards it is set to its maximum,
since a training step's temporaries are better reused than mapped again.

A mapped block costs a page fault for every 4 KiB each time it is allocated: with temporaries of
4 MiB above the threshold, two thirds of the time of encoding were faults. So the temporaries of
codecs (``quant.packed_rows``) and the panels of rows that they quantize are below it, and rows that
stay as they are read above. For the same reason the top of the heap is not trimmed after each of
them.

A merge keeps nothing but allocates chunks of one size again and again: there the heap is not
trimmed at each of them, but after a weight where more than 32 MiB are free. Chunks of another
weight have other sizes, and need not fit into the holes that the last ones have left.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

__all__ = [
    "keep_freed_memory",
    "read_available_memory",
    "return_freed_memory",
    "trim_heap",
]

_M_TRIM_THRESHOLD = -1  # malloc.h
_M_MMAP_THRESHOLD = -3  # malloc.h
_LOADING, _OTHERWISE = 2 * 1024 * 1024, 32 * 1024 * 1024  # the latter is glibc's upper limit
_TRIMMED_LOADING = 16 * 1024 * 1024  # more than the temporaries of the threads that quantize
_TRIMMED_OTHERWISE, _NEVER_TRIMMED = 128 * 1024, 2**30  # the former is glibc's default


@contextmanager
def return_freed_memory() -> Iterator[None]:
    """Return blocks from 2 MiB on to the system when they are freed, and keep up to 16 MiB of
    smaller ones for the next allocations; at the end, return all free blocks. A no-op without
    glibc."""
    _set_malloc_option(_M_MMAP_THRESHOLD, _LOADING)
    _set_malloc_option(_M_TRIM_THRESHOLD, _TRIMMED_LOADING)
    try:
        yield
    finally:
        _set_malloc_option(_M_MMAP_THRESHOLD, _OTHERWISE)
        _return_free_blocks()


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Keep blocks of up to 32 MiB for the next allocation of their size; at the end, return all
    free blocks to the system. A no-op without glibc.

    Memory is not cleared and mapped for each chunk, which takes longer than to fill it.
    """
    _set_malloc_option(_M_MMAP_THRESHOLD, _OTHERWISE)
    _set_malloc_option(_M_TRIM_THRESHOLD, _NEVER_TRIMMED)
    try:
        yield
    finally:
        _return_free_blocks()


class _HeapState(ctypes.Structure):
    """``struct mallinfo2`` (malloc.h): ten sizes, of which the ninth counts free blocks."""

    _fields_ = (
        ("others", ctypes.c_size_t * 8),
        ("free_bytes", ctypes.c_size_t),
        ("top_bytes", ctypes.c_size_t),
    )


def _return_free_blocks() -> None:
    _set_malloc_option(_M_TRIM_THRESHOLD, _TRIMMED_OTHERWISE)
    trim_heap()


def trim_heap(above: int = 0) -> None:
    """Return the free blocks of the heap to the system, those between blocks in use too. A no-op
    without glibc.

    Args:
        above: do so where more than this many bytes are free; ignored before glibc 2.33, which
            cannot say.
    """
    if (describe := _find_function("mallinfo2")) is not None:
        describe.restype = _HeapState
        if describe().free_bytes <= above:
            return
    if (trim := _find_function("malloc_trim")) is not None:
        trim(0)


def _set_malloc_option(option: int, value: int) -> None:
    if (mallopt := _find_function("mallopt")) is not None:
        mallopt(option, value)


def _find_function(name: str) -> Any:
    """Return a function of glibc; None with another C library, such as musl."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), name, None)


def read_available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process can still use: those that the system has, within the
    limits of the control groups that a container or batch system put it in.

    Args:
        root: of the file system with ``proc`` and ``sys``.
    """
    available = int(psutil.virtual_memory().available)
    for line in _read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers == "":  # version 2
            mount, limit, used, prefix = "sys/fs/cgroup", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            mount, prefix = "sys/fs/cgroup/memory", "total_"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / mount / own.lstrip("/")
        while group.is_relative_to(root / mount):
            found = _read_text(group / limit).strip()
            if found.isdigit():
                taken = int(_read_text(group / used) or 0) - _count_file_pages(group, prefix)
                available = min(available, max(0, int(found) - taken))
            group = group.parent
    return available


def _count_file_pages(group: Path, prefix: str) -> int:
    """Return the bytes of cached files, which count as used but make room."""
    lines = (line.split() for line in _read_text(group / "memory.stat").splitlines())
    stat = {line[0]: int(line[1]) for line in lines if len(line) == 2}
    return stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)


def _read_text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
