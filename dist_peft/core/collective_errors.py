"""Which exceptions say that a collective failed: a peer died, froze or was cut off."""

import torch.distributed as dist

__all__ = ["is_collective_error"]

_PHRASES = ("gloo", "Application timeout caused pair closure")
"""Parts of the messages of gloo, which raises a plain ``RuntimeError``: the path of its own source
file, but for the collectives that were pending when another one timed out."""


def is_collective_error(error: BaseException) -> bool:
    """Return whether ``error`` was raised by a collective of NCCL or gloo, or by the store."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)
