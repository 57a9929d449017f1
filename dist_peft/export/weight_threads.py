"""Process the weights of an export by threads, within a stated memory.

Tensors that belong to one weight, such as the experts of a stack, are processed by one thread, in
order: mergers and packers keep state for each weight, and none between weights.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager

import torch

from dist_peft.core.host_memory import trim_heap
from dist_peft.export.base_weights import BaseWeight

__all__ = ["MERGE_MEMORY", "count_merge_threads", "process_weights"]

MERGE_MEMORY = 512 * 2**20
"""Most memory of all threads together, the adapter not counted."""

_FREE_BYTES = 32 * 2**20
"""Free memory that is kept from one weight to the next; to return all of it costs page faults."""

_CHUNKS_ALIVE = 4
"""Chunks in float32 that a thread holds: rows as read, merged, as written, and packed."""


def count_merge_threads(chunk_bytes: int, held_bytes: int = 0) -> int:
    """Return how many threads fit into ``MERGE_MEMORY``, at most those that PyTorch would use.

    Args:
        chunk_bytes: size of a chunk of rows in float32.
        held_bytes: largest weight that is kept while its rows are processed, such as one that the
            files have transposed.
    """
    fitting = MERGE_MEMORY // (_CHUNKS_ALIVE * chunk_bytes + held_bytes)
    return max(1, min(torch.get_num_threads(), fitting))


def process_weights(
    weights: Sequence[BaseWeight],
    process: Callable[[BaseWeight, Callable[[], bool]], None],
    threads: int,
) -> None:
    """Call ``process`` with each weight, in this thread or in several.

    Args:
        process: gets the weight and a function that returns whether to stop early, because another
            thread has failed.

    Raises:
        Exception: the first error of ``process``.
    """
    stopping = threading.Event()
    if threads == 1:
        for weight in weights:
            process(weight, stopping.is_set)
            trim_heap(_FREE_BYTES)
        return
    groups: dict[str, list[BaseWeight]] = {}
    for weight in weights:
        groups.setdefault(weight.path, []).append(weight)

    def process_group(group: list[BaseWeight]) -> None:
        for weight in group:
            process(weight, stopping.is_set)
        trim_heap(_FREE_BYTES)

    with _one_thread_a_product(), ThreadPoolExecutor(threads, "merge") as pool:
        futures = [pool.submit(process_group, group) for group in groups.values()]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stopping.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@contextmanager
def _one_thread_a_product() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
