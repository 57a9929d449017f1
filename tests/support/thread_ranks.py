"""Ranks as threads of one process."""

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["run_ranks"]


def run_ranks(ranks: int, work: Callable[[int, Callable[[Tensor], Tensor]], Any]) -> list[Any]:
    """Run ``work(rank, reduce)`` in one thread a rank; ``reduce`` sums in the ranks' order.

    One rank runs in the caller's thread.
    """
    if ranks == 1:
        return [work(0, lambda tensor: tensor.clone())]
    barrier = threading.Barrier(ranks, timeout=60)
    board: list[Tensor | None] = [None] * ranks
    results: list[Any] = [None] * ranks

    def run(rank: int) -> None:
        def reduce(tensor: Tensor) -> Tensor:
            board[rank] = tensor
            barrier.wait()
            total = sum(t for t in board if t is not None)
            barrier.wait()
            assert isinstance(total, Tensor)
            return total

        try:
            results[rank] = work(rank, reduce)
        except Exception as error:
            barrier.abort()
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
