"""Memory of a card to plan for: as the user says, or of this host's."""

import torch

from dist_peft.plan.cluster import Cluster, parse_byte_count

__all__ = ["make_cluster"]

_UNLIMITED = 1 << 60


def make_cluster(nodes: int, gpus: int, gpu_memory: str | None) -> tuple[Cluster, bool]:
    """Return the cards to plan for, and whether their memory is known.

    Args:
        gpu_memory: such as ``24GiB``; None: that of this host's first card.

    Raises:
        UserError: ``gpu_memory`` is no amount of memory.
    """
    if gpu_memory is not None:
        return Cluster(nodes, gpus, parse_byte_count(gpu_memory)), True
    if torch.cuda.is_available():
        memory = int(torch.cuda.get_device_properties(0).total_memory)
        return Cluster(nodes, gpus, memory), True
    return Cluster(nodes, gpus, _UNLIMITED), False
