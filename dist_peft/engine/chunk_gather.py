"""The all-gather of packed rows, on CPUs as one broadcast from each rank.

An all-gather puts the chunks of all ranks one after the other::

    rank 0   | a |     ->   | a | b | c |   on every rank
    rank 1   | b |
    rank 2   | c |

gloo's costs up to three times the CPU time of a broadcast of each chunk, all of them under way at
the same time (``benchmarks/gather_cost.py``). As many bytes are sent. With many ranks the number of
broadcasts counts, so that larger groups, and devices with another backend, use the collective.
"""

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from dist_peft.engine.compat import all_gather

__all__ = ["LARGEST_GROUP", "all_gather_chunks"]

LARGEST_GROUP = 8
"""Most ranks that broadcast their chunks."""


def all_gather_chunks(
    output: Tensor,
    local: Tensor,
    group: dist.ProcessGroup,
    async_op: bool = False,
    largest_group: int = LARGEST_GROUP,
) -> dist.Work | None:
    """Gather ``local`` of every rank of ``group`` into ``output``.

    Args:
        output: ``[ranks * n]``, contiguous; the own chunk may be ``local`` itself.
        local: ``[n]``.
        group: all of its ranks call this in the same order.
        async_op: return at once; ``output`` is complete when the result has been waited for.
        largest_group: most ranks that broadcast.

    Returns:
        The work to wait for, or None without ``async_op``.
    """
    # a plan traces steps on fake tensors, of a subclass
    broadcasts = output.device.type == "cpu" and type(output.detach()) is Tensor
    if not broadcasts or not 1 < group.size() <= largest_group:
        work: dist.Work | None = all_gather(output, local, group=group, async_op=async_op)
        return work
    chunks = output.view(-1).chunk(group.size())
    own = chunks[group.rank()]
    if own.data_ptr() != local.data_ptr():
        own.copy_(local.view(-1))
    works = [
        dist.broadcast(chunk, group=group, async_op=True, group_src=source)
        for source, chunk in enumerate(chunks)
    ]
    joined = _Broadcasts([work for work in works if work is not None])
    if async_op:
        return joined
    joined.wait()
    return None


class _Broadcasts(dist.Work):
    """Several works as one."""

    def __init__(self, works: Sequence[dist.Work]) -> None:
        super().__init__()
        self._works = works

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        for work in self._works:
            work.wait(timeout)
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)
