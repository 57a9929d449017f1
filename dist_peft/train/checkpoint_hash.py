"""SHA-256 of the tensors of a checkpoint, the same however many ranks have written them.

Read back from the files: the hash is of the bytes that a resume gets. Tensors are hashed by name,
each whole, with its type and shape before its bytes; a part of them is in memory at a time.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dist_peft.core.world import World
from dist_peft.train.checkpoint import CheckpointManager
from dist_peft.train.checkpoint_verify import read_metadata

__all__ = ["hash_checkpoint_state"]

_PART_BYTES = 2**28
"""Read at a time, or one larger tensor."""


def hash_checkpoint_state(path: Path) -> str:
    """Return the SHA-256 of all tensors of checkpoint ``path``, in one process.

    Raises:
        UserError: files are missing or damaged.
    """
    infos = {
        name: info
        for name, info in read_metadata(path).state_dict_metadata.items()
        if isinstance(info, TensorStorageMetadata)
    }
    reader = CheckpointManager(path.parent, 1, World())
    digest = hashlib.sha256()
    for names in _split_names(infos):
        for name, tensor in sorted(reader.read_whole_tensors(path, names).items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _split_names(infos: Mapping[str, TensorStorageMetadata]) -> Iterator[list[str]]:
    """Yield sorted names in parts of at most ``_PART_BYTES``."""
    part: list[str] = []
    held = 0
    for name in sorted(infos):
        size = math.prod(infos[name].size) * infos[name].properties.dtype.itemsize
        if part and held + size > _PART_BYTES:
            yield part
            part, held = [], 0
        part.append(name)
        held += size
    if part:
        yield part
