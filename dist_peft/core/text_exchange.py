"""Exchange texts between ranks as bytes: nothing that a peer sends is unpickled.

torch's collectives of objects (``all_gather_object``, ``broadcast_object_list``, ...) unpickle the
bytes that arrive, and whoever reaches a rank's port could run code there. Texts here travel as
tensors of lengths (int64) and UTF-8 bytes (uint8, padded to the longest); callers put JSON into
them.

Every function is collective over its group; with one process and no group it exchanges nothing.
"""

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_gather_texts", "broadcast_text", "gather_texts", "scatter_texts"]


def all_gather_texts(text: str, group: dist.ProcessGroup | None = None) -> list[str]:
    """Return the texts of all ranks, by rank, on every rank."""
    if not dist.is_initialized():
        return [text]
    data = _encode(text)
    lengths = _all_gather_lengths(len(data), group)
    parts = [torch.empty(max(lengths), dtype=torch.uint8) for _ in lengths]
    if max(lengths):
        dist.all_gather(parts, _pad(data, max(lengths)), group=group)
    return [_decode(part[:length]) for part, length in zip(parts, lengths, strict=True)]


def gather_texts(text: str, group: dist.ProcessGroup | None = None) -> list[str]:
    """Return the texts of all ranks, by rank, on rank 0; an empty list elsewhere."""
    if not dist.is_initialized():
        return [text]
    data = _encode(text)
    lengths = _all_gather_lengths(len(data), group)
    is_first = dist.get_rank(group) == 0
    parts = [torch.empty(max(lengths), dtype=torch.uint8) for _ in lengths] if is_first else None
    if max(lengths):
        dist.gather(_pad(data, max(lengths)), parts, dst=_get_first_rank(group), group=group)
    return [_decode(part[:length]) for part, length in zip(parts or [], lengths, strict=False)]


def scatter_texts(texts: list[str], group: dist.ProcessGroup | None = None) -> str:
    """Return this rank's of the texts that rank 0 passes, by rank; elsewhere they are ignored."""
    if not dist.is_initialized():
        return texts[0]
    size, is_first = dist.get_world_size(group), dist.get_rank(group) == 0
    data = [_encode(text) for text in texts] if is_first else []
    lengths = torch.tensor([len(d) for d in data] if is_first else [0] * size)
    dist.broadcast(lengths, _get_first_rank(group), group=group)
    longest, mine = int(lengths.max()), int(lengths[dist.get_rank(group)])
    received = torch.empty(longest, dtype=torch.uint8)
    if longest:
        padded = [_pad(d, longest) for d in data] if is_first else None
        dist.scatter(received, padded, src=_get_first_rank(group), group=group)
    return _decode(received[:mine])


def broadcast_text(text: str, group: dist.ProcessGroup | None = None) -> str:
    """Return rank 0's text on every rank."""
    if not dist.is_initialized():
        return text
    is_first, source = dist.get_rank(group) == 0, _get_first_rank(group)
    data = _encode(text)
    length = torch.tensor([len(data)])
    dist.broadcast(length, source, group=group)
    if not is_first:
        data = torch.empty(int(length), dtype=torch.uint8)
    if len(data):
        dist.broadcast(data, source, group=group)
    return _decode(data)


def _all_gather_lengths(length: int, group: dist.ProcessGroup | None) -> list[int]:
    mine = torch.tensor([length])
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    return [int(part) for part in parts]


def _get_first_rank(group: dist.ProcessGroup | None) -> int:
    """Return rank 0 of ``group`` as the default group numbers it."""
    return 0 if group is None else dist.get_global_rank(group, 0)


def _encode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else _EMPTY


def _pad(data: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(data, (0, length - len(data)))


def _decode(data: Tensor) -> str:
    return bytes(data.numpy()).decode()


_EMPTY = torch.empty(0, dtype=torch.uint8)
