"""Copies of small host tensors, such as a batch, to a device, without waiting for them."""

import torch
from torch import Tensor

__all__ = ["copy_to_device"]


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``.

    From pageable memory a copy to a GPU waits until everything queued before it is done. Through
    pinned memory it is queued like a kernel; torch's host allocator keeps the pinned block until
    the copy is over, and then uses it for the next batch.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
