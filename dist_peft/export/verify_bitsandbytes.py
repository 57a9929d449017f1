"""Verify exports that bitsandbytes reads: the stored weights, then its kernels on this machine."""

from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dist_peft.export.time_limit import VerificationSkipped
from dist_peft.export.verdict import VerificationError
from dist_peft.export.verify import Comparison, compare_logits
from dist_peft.export.verify_consumer import run_plain_transformers
from dist_peft.export.verify_formats import (
    ConsumerRequest,
    ProcessConsumer,
    TransformersConsumer,
)

__all__ = ["dequantize_int8_linears", "patch_bitsandbytes_layers", "verify_with_bitsandbytes"]

_PLAIN_MARGIN = 0.05
"""Tolerance for a consumer's kernels against the stored weights, relative to the change by
training."""


def verify_with_bitsandbytes(request: ConsumerRequest) -> tuple[str, Comparison]:
    """Compare the stored weights, then plain ``transformers`` on this machine, with the probe.

    Returns:
        The versions of the libraries and the comparison.

    Raises:
        VerificationSkipped: plain ``transformers`` fails, or is further from the trained model
            than the stored weights are.
    """
    consumer, logits = _STORED.compute_logits(request)
    stored = compare_logits(logits, request.probe)
    dtype = str(request.dtype).removeprefix("torch.")
    plain_consumer = replace(_PLAIN, options=(dtype, "transformers", "bitsandbytes"))
    try:
        plain, logits = plain_consumer.compute_logits(request)
    except VerificationError as error:
        last = str(error).strip().splitlines()[-1]
        raise VerificationSkipped(
            f"plain transformers with bitsandbytes cannot run {request.path} on this machine "
            f"({last}). The files are correct: without the kernels that fail, {stored}"
        ) from None
    found = compare_logits(logits, request.probe)
    if not found.relative <= stored.relative + _PLAIN_MARGIN:
        raise VerificationSkipped(
            f"bitsandbytes does not compute with the stored weights on this machine: {found}; "
            f"without its AVX512 kernels, {stored}. Use another machine or another format"
        )
    return plain if consumer == plain else f"{plain}, plain", found


def patch_bitsandbytes_layers(model: nn.Module) -> bool:
    """Make a bitsandbytes model compute with the stored weights on any CPU.

    With AVX512, bitsandbytes 0.50 dequantizes linears incorrectly if ``in_features`` is not a
    multiple of the block size (flattened to one row they are dequantized correctly): these are
    replaced by dense linears. With AVX512-BF16, its products in evaluation round activations and
    scales to bfloat16 for any model type, an error of 0.3 %: that kernel is disabled.

    Returns:
        Whether anything was changed.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    changed = False
    for name, module in list(model.named_modules()):
        if not isinstance(module, Linear4bit):
            continue
        changed |= bool(getattr(module, "support_avx512bf16_for_cpu", False))
        module.support_avx512bf16_for_cpu = False
        packed: Any = module.weight
        state = packed.quant_state
        if module.in_features % state.blocksize == 0:
            continue
        in_one_row = copy(state)
        in_one_row.shape = torch.Size([state.shape.numel()])
        weight = dequantize_4bit(packed.data, in_one_row).reshape(state.shape)
        if not torch.equal(weight, dequantize_4bit(packed.data, state)):
            dense = nn.Linear(module.in_features, module.out_features, device="meta")
            dense.weight, dense.bias = nn.Parameter(weight), module.bias
            model.set_submodule(name, dense)
            changed = True
    return changed


def dequantize_int8_linears(model: nn.Module) -> str:
    """Replace linears of LLM.int8 by dense ones with the stored weights; return a note."""
    from bitsandbytes.functional import int8_vectorwise_dequant
    from bitsandbytes.nn import Linear8bitLt

    for name, module in list(model.named_modules()):
        if not isinstance(module, Linear8bitLt):
            continue
        packed: Any = module.weight
        scales: Any = packed.SCB if packed.SCB is not None else module.state.SCB
        dense = nn.Linear(module.in_features, module.out_features, device="meta")
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        weight = int8_vectorwise_dequant(packed.data, scales).to(dtype)
        dense.weight, dense.bias = nn.Parameter(weight), module.bias
        model.set_submodule(name, dense)
    return ", activations not rounded"


def _patch_and_note(model: Any) -> str:
    return " without its AVX512 kernels" * patch_bitsandbytes_layers(model)


_STORED = TransformersConsumer(
    needs=("bitsandbytes", "accelerate"),
    reports=("bitsandbytes",),
    settings={"device_map": "cpu"},
    prepare=_patch_and_note,  # before PEFT wraps the linears
    generates=False,  # the plain path does
)
_PLAIN = ProcessConsumer("bnb-nf4", run_plain_transformers)
