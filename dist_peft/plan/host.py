"""Host memory of a rank while the base is loaded, of a merge and of its verification.

Imports (about 0.6 GiB a process) are not counted.
"""

from dataclasses import dataclass
from math import prod

from dist_peft.core.span import row_span
from dist_peft.export.merged_weights import CHUNK_BYTES
from dist_peft.model.skeleton import Skeleton, parse_torch_dtype
from dist_peft.plan.resting import RestingBytes
from dist_peft.quant.packed_rows import CHUNK_ELEMENTS

__all__ = ["HostPeaks", "count_stack_rows", "plan_host_peaks"]

_ENCODER_TEMPORARIES = 7 * 4 * CHUNK_ELEMENTS
"""About seven float32 temporaries of a chunk are alive while rows are quantized."""


@dataclass(frozen=True)
class HostPeaks:
    """Bytes of host memory.

    Attributes:
        load: of a rank, on CUDA: the largest slice that it reads and encodes.
        rest: of a rank during training: offloaded or paged state.
        merge: of ``dist-peft merge`` without verification.
        verify: of the verification, which loads the merged model.
    """

    load: int
    rest: int
    merge: int
    verify: int


def count_stack_rows(shape: tuple[int, ...]) -> int:
    """Return the rows of a tensor as engines share them: those of all experts of a stack."""
    return prod(shape[:-1]) if len(shape) > 2 else prod(shape[:1])


def plan_host_peaks(skeleton: Skeleton, resting: RestingBytes, shards: int) -> HostPeaks:
    """Return the peaks; rows are spread over ``shards`` ranks."""
    sizes = [
        len(row_span(rows, shards, 0)) * (spec.num_bytes // rows)
        for spec in skeleton.tensors.values()
        if (rows := count_stack_rows(spec.shape))
    ]
    dtype = parse_torch_dtype(str(skeleton.model_config.dtype).removeprefix("torch."))
    numbers = sum(prod(spec.shape) for spec in skeleton.tensors.values())
    return HostPeaks(
        load=max(sizes) + _ENCODER_TEMPORARIES + sum(resting.host.values()),
        rest=sum(resting.host.values()),
        merge=3 * CHUNK_BYTES + 4 * resting.trainable,
        verify=numbers * dtype.itemsize,
    )
