"""Host memory of a rank while the base is loaded, of a merge and of its verification.

Imports (about 0.6 GiB a process) are not counted.
"""

from dataclasses import dataclass
from math import prod

from dist_peft.adapters.lora.through_rows import ThroughRows
from dist_peft.core.span import row_span
from dist_peft.export.verify import COMPARED_ELEMENTS
from dist_peft.export.verify_blocks import MAX_PROBE_TOKENS
from dist_peft.export.weight_threads import MERGE_MEMORY
from dist_peft.model.experts import ExpertStack
from dist_peft.model.frozen_linear import FrozenLinear, FrozenWeight
from dist_peft.model.skeleton import Skeleton, parse_torch_dtype
from dist_peft.model.streamed_weights import PANEL_BYTES
from dist_peft.plan.resting import RestingBytes
from dist_peft.quant.packed_rows import CHUNK_ELEMENTS

__all__ = ["HostPeaks", "count_stack_rows", "plan_host_peaks"]

_ENCODER_TEMPORARIES = 7 * 4 * CHUNK_ELEMENTS
"""About seven float32 temporaries of a chunk are alive while rows are quantized."""


_PANELS_ALIVE = 4
"""Rows of a matrix as read, packed, and in float32 while they are multiplied."""

_LOGITS_ALIVE = 4
"""Tensors of the probe's logits in float32 while they are compared: two of the probe, those of the
export, and these in its type."""

_COMPARED_BYTES = 8 * 8 * COMPARED_ELEMENTS
"""About eight float64 temporaries of the logits that are compared at a time."""


@dataclass(frozen=True)
class HostPeaks:
    """Bytes of host memory.

    Attributes:
        load: of a rank, on CUDA: the largest slice that it reads and encodes.
        rest: of a rank during training: offloaded or paged state, ``kept_rows``, ``factor`` and
            ``block_inputs``.
        merge: of ``dist-peft merge`` without verification, with as many threads as it uses at most.
        verify: of a verification that loads the merged model with its library.
        verify_blocks: of one that reads it block by block.
    """

    load: int
    rest: int
    merge: int
    verify: int
    verify_blocks: int
    kept_rows: int = 0
    """Rows of the base's files that ``adapter.through_quantizer`` encodes again in each step."""
    kept_weights: int = 0
    """Numbers of weights in them."""
    block_inputs: int = 0
    """Inputs of blocks from forward to backward (``engine.offload_inputs``), pinned."""
    factor: int = 0
    """Largest factor of GPTQ, which is read to encode rows through the quantizer."""
    factor_files: int = 0
    """Factors on disk, at most: linears that share an input share one."""


def count_stack_rows(shape: tuple[int, ...]) -> int:
    """Return the rows of a tensor as engines share them: those of all experts of a stack."""
    return prod(shape[:-1]) if len(shape) > 2 else prod(shape[:1])


def plan_host_peaks(
    skeleton: Skeleton,
    resting: RestingBytes,
    shards: int,
    block_inputs: int = 0,
    *,
    solves: bool = False,
) -> HostPeaks:
    """Return the peaks; rows are spread over ``shards`` ranks, each with ``block_inputs`` bytes.

    Args:
        solves: ``base.quant.solver`` is gptq.
    """
    kept_weights, kept_rows = _count_kept_rows(skeleton, shards)
    factors = _list_factor_bytes(skeleton) if solves and kept_rows else [0]
    rest = sum(resting.host.values()) + kept_rows + max(factors)
    sizes = [
        len(row_span(rows, shards, 0)) * (spec.num_bytes // rows)
        for spec in skeleton.tensors.values()
        if (rows := count_stack_rows(spec.shape))
    ]
    dtype = parse_torch_dtype(str(skeleton.model_config.dtype).removeprefix("torch."))
    numbers = sum(prod(spec.shape) for spec in skeleton.tensors.values())
    return HostPeaks(
        load=max(sizes) + _ENCODER_TEMPORARIES + rest,
        rest=rest + block_inputs,
        merge=MERGE_MEMORY + 4 * resting.trainable,
        verify=numbers * dtype.itemsize,
        verify_blocks=_count_streamed_bytes(skeleton),
        kept_rows=kept_rows,
        kept_weights=kept_weights,
        block_inputs=block_inputs,
        factor=max(factors),
        factor_files=sum(factors),
    )


def _list_factor_bytes(skeleton: Skeleton) -> list[int]:
    """Return the bytes of the factor of each linear of a base that is not packed in its files:
    float32 ``[in, in]`` and its order, padded to groups."""
    found = []
    for module in skeleton.model.modules():
        rows = module.codec.affine_rows if isinstance(module, FrozenLinear) else None
        if isinstance(module, FrozenLinear) and rows is not None and module.stored is None:
            padded = -(-module.in_features // rows.group_size) * rows.group_size
            found.append(4 * padded**2 + 8 * padded)
    return found or [0]


def _count_kept_rows(skeleton: Skeleton, shards: int) -> tuple[int, int]:
    """Return weights and bytes of the fullest rank's rows that are kept, in the files' type or
    packed."""
    weights = size = 0
    for layer in skeleton.model.modules():
        if isinstance(layer, ThroughRows):
            base = layer.base
            known = skeleton.tensors.get(_find_first_source(base))
            width = 4 if known is None else min(4, known.dtype.itemsize)
            rows = len(row_span(len(base.packed), shards, 0))
            kept = base.in_features * width
            if base.stored is not None:
                kept = base.codec.num_row_bytes(base.in_features)
            weights, size = weights + rows * base.in_features, size + rows * kept
    return weights, size


def _find_first_source(weight: FrozenWeight) -> str:
    """Return the tensor of the files that has a weight's first rows."""
    pieces = weight.pieces if isinstance(weight, ExpertStack) else ()
    return pieces[0].name if pieces else weight.source


def _count_streamed_bytes(skeleton: Skeleton) -> int:
    """Return the peak of a forward pass on a probe whose weights are read on use."""
    block = max(
        sum(
            parameter.numel() * parameter.element_size()
            for module in block.modules()
            if not isinstance(module, FrozenWeight)
            for parameter in module.parameters(recurse=False)
        )
        for block in skeleton.blocks
    )
    logits = MAX_PROBE_TOKENS * skeleton.vocabulary_size
    return _PANELS_ALIVE * PANEL_BYTES + block + _LOGITS_ALIVE * 4 * logits + _COMPARED_BYTES
