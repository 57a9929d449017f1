"""``x W^T`` with a packed, frozen ``W`` that is dense only while it multiplies.

    forward    y  = x W^T      W dequantized, used, freed
    backward   dx = dy W       W dequantized again, used, freed;  no gradient for W

This is the step of QLoRA (Dettmers et al. 2023, equation 5) that makes it cheap in memory: only
the packed bytes, which exist anyway, are kept between forward and backward.

The function keeps the *packed tensor object*, as an attribute and not by ``save_for_backward``.
Engines free the bytes after forward and gather them again before backward: FSDP2 resizes the
storage, ZeRO-3 exchanges the tensor's data. A view or copy kept here would miss the new bytes, or
pin the old ones in memory; autograd's check of saved tensors would take the refill for a change of
the weight.

``quant.grouped_matmul`` does the same for the experts of a mixture, whose weights are stacked.

On a CPU without instructions for 16-bit floats, 16-bit products are computed in float32 and rounded
once (``quant.cpu_products``). Kernels accumulate in float32 anyway.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dist_peft.quant.codec import Codec
from dist_peft.quant.cpu_products import has_fast_product
from dist_peft.quant.kept_results import keep_result
from dist_peft.quant.shared_decodes import (
    BlockDecodes,
    get_block_decodes,
    hold_decode,
    take_decode,
)

__all__ = [
    "check_packed_storage",
    "dequantize_weight",
    "frozen_matmul",
    "hold_weight",
    "matmul_fp32_accumulate",
    "take_weight",
]


def frozen_matmul(x: Tensor, packed: Tensor, codec: Codec, in_features: int) -> Tensor:
    """``x W^T`` with ``W = codec.decode(packed)``, differentiable in ``x`` alone.

    Args:
        x: ``[..., in]``, any float type; the weight is dequantized to this type.
        packed: ``uint8 [out, row_bytes]``; kept for backward if ``x`` requires a gradient.
        codec: of ``packed``.
        in_features: columns of the weight.

    Returns:
        ``[..., out]`` in the type of ``x``.

    Raises:
        ValueError: shapes or types do not fit.
        RuntimeError: the bytes of ``packed`` are not there (its engine has freed them).
    """
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x is floating point [..., {in_features}], not {x.dtype} {list(x.shape)}")
    result: Tensor = _FrozenMatmul.apply(x, packed, codec, in_features)
    return result


class _FrozenMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, codec: Codec, in_features: int) -> Tensor:
        # where x needs no gradient, torch drops ctx with the call
        ctx.packed, ctx.codec, ctx.in_features = packed, codec, in_features
        ctx.decodes = get_block_decodes()

        def multiply() -> Tensor:
            weight = hold_weight(packed, codec, in_features, x.dtype, ctx.needs_input_grad[0])
            return matmul_fp32_accumulate(functional.linear, x, weight)

        return keep_result("product", multiply)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        weight = take_weight(ctx.decodes, ctx.packed, ctx.codec, ctx.in_features, grad.dtype)
        return matmul_fp32_accumulate(torch.matmul, grad, weight), None, None, None


def matmul_fp32_accumulate(
    multiply: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor
) -> Tensor:
    """``multiply(x, weight)``, two matrices of one type; see the module."""
    if not has_fast_product(x.device, x.dtype):
        return multiply(x.float(), weight.float()).to(x.dtype)
    return multiply(x, weight)


def dequantize_weight(packed: Tensor, codec: Codec, in_features: int, dtype: torch.dtype) -> Tensor:
    """Dequantize a whole packed weight to ``dtype [rows, in]``.

    Raises:
        RuntimeError: the bytes of ``packed`` are not there (its engine has freed them).
    """
    check_packed_storage(packed)
    return codec.dequantize_rows(packed, in_features, dtype)


def hold_weight(
    packed: Tensor, codec: Codec, in_features: int, dtype: torch.dtype, is_needed: bool
) -> Tensor:
    """``dequantize_weight`` in forward; recomputation may hold it (``quant.shared_decodes``).

    Args:
        is_needed: backward takes the weight too.
    """
    decode = partial(dequantize_weight, packed, codec, in_features, dtype)
    return hold_decode(packed, dtype, decode, is_needed)


def take_weight(
    decodes: BlockDecodes | None,
    packed: Tensor,
    codec: Codec,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """``dequantize_weight`` in backward, or the weight that recomputation has held."""
    decode = partial(dequantize_weight, packed, codec, in_features, dtype)
    return take_decode(decodes, packed, dtype, decode)


def check_packed_storage(packed: Tensor) -> None:
    """Check that the bytes of a packed weight are there.

    Raises:
        RuntimeError: its engine has freed them.
    """
    # reading a storage of size 0 would crash the process
    if packed.numel() and not packed.untyped_storage().nbytes():
        raise RuntimeError(
            f"the packed weight {list(packed.shape)} has no storage: its engine freed it and did "
            f"not gather it again"
        )
