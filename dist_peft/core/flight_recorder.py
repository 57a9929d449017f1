"""torch's flight recorder: the last collectives of a process, and how far each of them came.

It keeps the last ``TORCH_FR_BUFFER_SIZE`` of them (2000; before torch 2.9
``TORCH_NCCL_TRACE_BUFFER_SIZE``, which still works). ``torchfrtrace DIR --prefix flight_recorder_``
compares the files of all ranks where the backend is NCCL; gloo's lack the table of groups.
"""

from pathlib import Path

import torch.distributed as dist
from torch._C import _distributed_c10d

__all__ = ["dump_flight_recorder"]


def dump_flight_recorder(file: Path) -> bool:
    """Write the recorder's entries to ``file``, in torch's own format.

    Returns:
        False where there is no process group, or torch has no recorder for its backend.
    """
    if not dist.is_initialized():
        return False
    name = "_dump_nccl_trace" if "nccl" in dist.get_backend_config() else "_dump_fr_trace"
    dump = getattr(_distributed_c10d, name, None)
    if dump is None:
        return False
    contents: bytes = dump()
    file.write_bytes(contents)
    return True
