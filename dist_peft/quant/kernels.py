"""Decoding: packed codes and scales -> a dense weight, the inner loop of every forward pass.

On a GPU ``quant.device`` decodes whole packed rows in one launch where it can; this module has the
other paths, for codes and scales that were taken apart.

Two paths return the same bits. ``torch``: a table look-up of the codes (``quant.pack.lookup``),
then products in place, a chunk of rows at a time, on any device. ``bnb``: the operator
``bitsandbytes::dequantize_4bit``, for NF4 only.

Both multiply in float32 and round once to the wanted type, so bf16 output is the float32 output
rounded. ``DIST_PEFT_KERNELS`` chooses:

    auto    on CUDA the fused kernels of ``quant.device`` (``quant.device_choice``); else bnb on
            CUDA where bitsandbytes is installed and knows the block size, and on a CPU where a
            trial (``quant.decode_trial``) finds it equal and faster; else torch
    torch   always torch
    bnb     always bnb; a UserError where that is impossible
    triton  the fused kernels on CUDA, a UserError without the package; torch on a CPU

Importing bitsandbytes takes seconds, so that on a CPU the trial waits until as much has been spent
on decoding: short runs never import it. As the bits are the same, nothing else changes then.
"""

import importlib
import logging
from functools import cache, partial
from types import ModuleType

import torch
from torch import Tensor

from dist_peft.core.errors import UserError
from dist_peft.quant.assumed_device import get_assumed_device
from dist_peft.quant.decode_trial import is_equal_and_faster
from dist_peft.quant.device_choice import KERNELS_VARIABLE, read_kernels_choice
from dist_peft.quant.pack import lookup_packed_values
from dist_peft.quant.packed_rows import list_row_chunks

__all__ = [
    "NF4_LEVELS",
    "choose_nf4_kernel",
    "dequantize_affine",
    "dequantize_by_table",
    "dequantize_nf4",
]

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Levels of the 16 codes (QLoRA, appendix E), as float32 prints them."""

log = logging.getLogger("dist_peft")

# bitsandbytes also takes 2048 and 4096, but compiles a fallback for them on AVX512 hosts
_BNB_GROUP_SIZES = (32, 64, 128, 256, 512, 1024)
_BNB_TYPES = (torch.float32, torch.bfloat16, torch.float16)

TRIAL_WEIGHTS = 2**32
"""Weights that a process decodes on the CPU by torch, in about ten seconds, before the trial."""


class _DecodedWeights:
    """How many weights this process has decoded by torch on a CPU."""

    def __init__(self) -> None:
        self.count = 0


_decoded = _DecodedWeights()


def dequantize_nf4(payload: Tensor, absmax: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """NF4 codes and block scales -> weight.

    Args:
        payload: ``uint8 [rows, blocks * group_size / 2]``, even element in the high nibble.
        absmax: ``float32 [rows, blocks]``.
        in_features: columns of the result; the rest of the last block is padding.
        dtype: type of the result.

    Returns:
        ``dtype [rows, in_features]``.

    Raises:
        UserError: ``DIST_PEFT_KERNELS`` is unknown, or requests an unavailable kernel.
    """
    rows, blocks = absmax.shape
    group_size = payload.shape[1] * 2 // max(1, blocks)
    # a fake tensor, of a subclass, takes the path that a plan counts
    is_planned = payload.device.type == "cpu" and type(payload) is not Tensor
    kernel = choose_nf4_kernel(group_size, dtype, payload.device)
    if kernel == "torch" or is_planned or not absmax.numel():
        if payload.device.type == "cpu" and not is_planned:
            _decoded.count += rows * in_features
        return _dequantize_nf4_by_torch(payload, absmax, in_features, dtype)
    weight = _dequantize_by_bnb(payload, absmax, dtype)
    return weight if weight.shape[1] == in_features else weight[:, :in_features].contiguous()


def _dequantize_nf4_by_torch(
    payload: Tensor, absmax: Tensor, in_features: int, dtype: torch.dtype
) -> Tensor:
    return dequantize_by_table(payload, 4, NF4_LEVELS, absmax, in_features, dtype, high_first=True)


def _dequantize_by_bnb(payload: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """``dtype [rows, blocks * group_size]``."""
    rows, padded = len(payload), 2 * payload.shape[1]
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        payload.reshape(-1, 1),
        absmax.flatten(),
        padded // absmax.shape[1],
        "nf4",
        [rows, padded],
        dtype,
    )
    return weight


def dequantize_affine(
    payload: Tensor, bits: int, scale: Tensor, zero: Tensor, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Affine codes -> weight ``(code - zero) * scale``.

    Args:
        payload: ``uint8 [rows, groups * group_size * bits / 8]``, LSB first.
        bits: bits of a code.
        scale, zero: ``[rows, groups]``, any float type.
        in_features, dtype: as in ``dequantize_nf4``.

    Returns:
        ``dtype [rows, in_features]``.
    """
    values = tuple(float(code) for code in range(2**bits))
    return dequantize_by_table(
        payload, bits, values, scale.float(), in_features, dtype, zero.float()
    )


def dequantize_by_table(
    payload: Tensor,
    bits: int,
    values: tuple[float, ...],
    scale: Tensor,
    in_features: int,
    dtype: torch.dtype,
    zero: Tensor | None = None,
    high_first: bool = False,
) -> Tensor:
    """``(values[code] - zero) * scale`` by chunks of rows: float32 temporaries stay small.

    Args:
        payload: ``uint8 [rows, groups * group_size * bits / 8]``.
        bits: bits of a code.
        values: of the ``2^bits`` codes.
        scale, zero: ``float32 [rows, groups]``; zero None: 0.
        in_features, dtype: as in ``dequantize_nf4``.
        high_first: whether the even code of a byte has the high bits.

    Returns:
        ``dtype [rows, in_features]``.
    """
    rows, groups = scale.shape
    if not rows * in_features:
        return torch.empty(rows, in_features, dtype=dtype, device=payload.device)

    def decode_chunk(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        numbers = lookup_packed_values(codes, bits, values, high_first=high_first, groups=groups)
        if zero is not None:
            numbers.sub_(zero.unsqueeze(-1))
        numbers.mul_(scale.unsqueeze(-1))
        return numbers.view(len(codes), -1)

    spans = list_row_chunks(rows, in_features, payload.device)
    if len(spans[0]) == rows:  # a small weight: a third of the operators go
        whole = decode_chunk(payload, scale, zero).to(dtype)
        return whole if whole.shape[1] == in_features else whole[:, :in_features].contiguous()
    weight = torch.empty(rows, in_features, dtype=dtype, device=payload.device)
    for span in spans:
        part = None if zero is None else zero[span.slice]
        numbers = decode_chunk(payload[span.slice], scale[span.slice], part)
        weight[span.slice] = numbers[:, :in_features]
    return weight


def choose_nf4_kernel(group_size: int, dtype: torch.dtype, device: torch.device) -> str:
    """Which path decodes NF4: ``torch`` or ``bnb`` (see the module)."""
    wanted = read_kernels_choice()
    assumed = get_assumed_device()
    device = assumed or device
    if wanted in ("torch", "triton") or (wanted == "auto" and device.type not in ("cuda", "cpu")):
        return "torch"
    possible = group_size in _BNB_GROUP_SIZES and dtype in _BNB_TYPES
    if wanted == "auto" and device.type == "cpu":
        due = possible and assumed is None and _decoded.count >= TRIAL_WEIGHTS
        return "bnb" if due and _is_bnb_faster(group_size, dtype) else "torch"
    if wanted == "auto":
        # without its compiled CUDA library the operator would run a slow Python fallback
        module = _import_bitsandbytes() if possible else None
        works = module is not None and (assumed is not None or module.lib.compiled_with_cuda)
        return "bnb" if works else "torch"
    if not possible:
        raise UserError(
            f"{KERNELS_VARIABLE}=bnb cannot decode group_size {group_size} to {dtype}, only "
            f"{_BNB_GROUP_SIZES} to float32, bfloat16, float16; use {KERNELS_VARIABLE}=auto"
        )
    if _import_bitsandbytes() is None:
        raise UserError(
            f"{KERNELS_VARIABLE}=bnb but bitsandbytes is not installed; "
            f"pip install bitsandbytes, or use {KERNELS_VARIABLE}=auto"
        )
    return "bnb"


@cache
def _is_bnb_faster(group_size: int, dtype: torch.dtype) -> bool:
    """Whether bitsandbytes' operator is installed, and equal and faster on this processor."""
    if _import_bitsandbytes() is None:
        return False

    def by_torch(payload: Tensor, absmax: Tensor) -> Tensor:
        columns = 2 * payload.shape[1]
        return _dequantize_nf4_by_torch(payload, absmax, columns, dtype)

    by_bnb = partial(_dequantize_by_bnb, dtype=dtype)
    faster = is_equal_and_faster(by_bnb, by_torch, group_size)
    log.info("NF4 is decoded to %s by %s", dtype, "bitsandbytes" if faster else "torch")
    return faster


@cache
def _import_bitsandbytes() -> ModuleType | None:
    """bitsandbytes' module of its native library; importing it registers the operators."""
    try:
        importlib.import_module("bitsandbytes")
        return importlib.import_module("bitsandbytes.cextension")
    except ImportError:
        return None
