"""Who encodes and decodes packed rows: the fused kernels of a GPU, or torch.

``quant.device`` decodes a weight in one launch, where the operators of torch need dozens. It is
used where all of this holds, and nothing else changes, as the bits are the same:

    DIST_PEFT_KERNELS   auto or triton
    device              CUDA of capability 8.0 or more; a CPU is always torch
    type                float32, bfloat16, float16
    Triton              installed (the extra ``triton``; torch's CUDA wheels bring it along)
    trial               the first call of each kind gives the bits of torch on its first rows

The trial keeps a run alive where a kernel cannot be compiled (Triton needs a C compiler at run
time) or where a device rounds in another way. Under ``auto`` the first reason for the slow path on
CUDA is logged once, as a warning; ``triton`` insists: without the package it is a UserError, and
errors of kernels are shown. For tests, ``triton`` also takes CPU tensors where Triton interprets
(``TRITON_INTERPRET=1``).

Fake tensors, with which a step is planned, always take the path of torch, whose temporaries are an
upper bound.
"""

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dist_peft.core.errors import UserError
from dist_peft.quant.assumed_device import get_assumed_device

__all__ = [
    "KERNELS_VARIABLE",
    "RowKind",
    "RowLayout",
    "dequantize_on_device",
    "is_device_path",
    "is_trusted",
    "quantize_on_device",
    "read_kernels_choice",
]

log = logging.getLogger("dist_peft")

KERNELS_VARIABLE = "DIST_PEFT_KERNELS"
_CHOICES = ("auto", "torch", "bnb", "triton")
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)
_TRIAL_ROWS = 8


RowKind = Literal["nf4", "affine", "mxfp4", "nvfp4", "fp8"]
"""Codes and scales that the decode kernel knows; the first two are encoded by kernels, too."""


class RowLayout(NamedTuple):
    """Where a packed row has its codes and scales.

    Attributes:
        bits: of a code; 4 of NF4, MXFP4 and NVFP4, 8 of FP8.
        group_size: weights of a group, a multiple of 8.
        groups: of a row, the last one filled up.
        scales: first byte behind the codes and their padding.
        runs: NF4 with double quantization: second-level groups of a row; else 0.
        row_bytes: of a row.
        kind: of codes and scales.
    """

    bits: int
    group_size: int
    groups: int
    scales: int
    runs: int
    row_bytes: int
    kind: RowKind


class _DeviceState:
    """Verdicts of this process: by kind of call, and whether the warning was logged."""

    def __init__(self) -> None:
        self.verdicts: dict[tuple[object, ...], bool] = {}
        self.has_warned = False


_state = _DeviceState()


def read_kernels_choice() -> str:
    """Return ``DIST_PEFT_KERNELS``: auto, torch, bnb or triton.

    Raises:
        UserError: it has another value.
    """
    wanted = os.environ.get(KERNELS_VARIABLE, "auto")
    if wanted not in _CHOICES:
        raise UserError(f"{KERNELS_VARIABLE}={wanted!r} is not one of {', '.join(_CHOICES)}")
    return wanted


def dequantize_on_device(
    packed: Tensor,
    layout: RowLayout,
    in_features: int,
    dtype: torch.dtype,
    by_torch: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """Decode by the fused kernel, where that is possible and trusted (see the module).

    Args:
        packed: ``uint8 [rows, row_bytes]``.
        layout: of a row.
        in_features, dtype: of the result.
        by_torch: decodes such rows by torch, for the trial.

    Returns:
        ``dtype [rows, in_features]``, or None: decode by torch.

    Raises:
        UserError: ``DIST_PEFT_KERNELS`` is unknown, or asks for a missing package.
    """
    if not is_device_path(packed, dtype):
        return None

    def by_device(some: Tensor) -> Tensor:
        module = importlib.import_module("dist_peft.quant.device")
        weight: Tensor = module.dequantize_rows(some, layout, in_features, dtype)
        return weight

    key = ("decode", *_describe_kind(layout), dtype, packed.device)
    return by_device(packed) if is_trusted(key, packed.detach, by_device, by_torch) else None


def quantize_on_device(
    weight: Tensor, layout: RowLayout, by_torch: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """Encode by the fused kernels, where that is possible and trusted.

    Args:
        weight: ``[rows, in]``, any float type.
        layout: of a row of NF4 or of affine integers.
        by_torch: encodes such rows by torch, for the trial.

    Returns:
        ``uint8 [rows, row_bytes]``, or None: encode by torch, which also reports a weight that is
        not finite.
    """
    if weight.dim() != 2 or not weight.numel() or not is_device_path(weight, weight.dtype):
        return None

    def by_device(some: Tensor) -> Tensor | None:
        module = importlib.import_module("dist_peft.quant.device_encode")
        if layout.group_size > module.LARGEST_GROUP:
            return None
        is_nf4 = layout.kind == "nf4"
        encode = module.quantize_nf4_rows if is_nf4 else module.quantize_affine_rows
        packed: Tensor | None = encode(some, layout)
        return packed

    key = ("encode", *_describe_kind(layout), weight.dtype, weight.device)
    return by_device(weight) if is_trusted(key, weight.detach, by_device, by_torch) else None


def is_device_path(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether kernels can compute with this tensor in ``dtype`` (see the module); warns once where
    a GPU cannot.

    Raises:
        UserError: ``DIST_PEFT_KERNELS`` is unknown, or asks for a missing package.
    """
    if tensor.device.type != "cuda" and not _is_interpreted(tensor):
        return False  # at once: this is asked for every weight
    wanted = read_kernels_choice()
    if wanted in ("torch", "bnb") or dtype not in _TYPES:
        return False
    if tensor.device.type != "cuda" and wanted != "triton":
        return False
    # a fake tensor is of a subclass
    if get_assumed_device() is not None or type(tensor.detach()) is not Tensor:
        return False
    if tensor.device.type == "cpu":
        return True
    reason = _explain_slow_path(tensor.device)
    if reason is None:
        return True
    if wanted == "triton":
        raise UserError(f"{KERNELS_VARIABLE}=triton but {reason}, or use {KERNELS_VARIABLE}=auto")
    _warn_once(reason)
    return False


def _explain_slow_path(device: torch.device) -> str | None:
    """Why this GPU cannot run the kernels, and the remedy; None if it can."""
    if not _is_triton_installed():
        return "triton is not installed; pip install 'dist_peft[triton]'"
    if torch.version.hip is not None:
        return "the fused kernels are for CUDA, not for ROCm; use a CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return f"the GPU has capability {capability[0]}.{capability[1]}; use one of 8.0 or more"
    return None


def _is_interpreted(tensor: Tensor) -> bool:
    """Whether kernels run on this tensor of a CPU."""
    return tensor.device.type == "cpu" and _does_triton_interpret()


@cache
def _does_triton_interpret() -> bool:
    """Read once, as Triton does when kernels are defined; an unknown choice is refused then."""
    read_kernels_choice()
    return os.environ.get("TRITON_INTERPRET") == "1" and _is_triton_installed()


@cache
def _is_triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _describe_kind(layout: RowLayout) -> tuple[object, ...]:
    return layout.kind, layout.bits, layout.group_size, layout.runs > 0


def is_trusted(
    key: tuple[object, ...],
    make_rows: Callable[[], Tensor],
    by_device: Callable[[Tensor], Tensor | None],
    by_torch: Callable[[Tensor], Tensor],
) -> bool:
    """Whether a kind of call gave the bits of torch when it came first.

    Args:
        key: of the kind; the verdict is kept for it.
        make_rows: returns rows, of which the first ones are the trial's.
        by_device, by_torch: both ways.
    """
    if key in _state.verdicts or read_kernels_choice() == "triton":
        return _state.verdicts.get(key, True)
    some = make_rows()[:_TRIAL_ROWS]
    if not some.numel():
        return True
    try:
        found = by_device(some)
    except Exception as error:  # of the compiler, the C compiler or the driver
        reason = str(error).strip() or type(error).__name__
        _state.verdicts[key] = False
        _warn_once(f"Triton cannot run its kernels here ({reason.splitlines()[0]})")
        return False
    if found is None:  # weights that are not finite, or large groups: torch this time
        return False
    _state.verdicts[key] = torch.equal(
        found.view(torch.uint8), by_torch(some).contiguous().view(torch.uint8)
    )
    if not _state.verdicts[key]:
        _warn_once(f"a kernel ({key[0]}) does not give the bits of torch on {some.device}")
    return _state.verdicts[key]


def _warn_once(reason: str) -> None:
    if not _state.has_warned:
        _state.has_warned = True
        log.warning(
            "Packed weights take the slow path on this GPU, dozens of launches a weight: %s", reason
        )
