"""``x W^T`` with a packed, frozen ``W`` that is dense only while it multiplies.

    forward    y  = x W^T      W decoded, used, dropped
    backward   dx = dy W       W decoded again, used, dropped;  no gradient for W

This is the step of QLoRA (Dettmers et al. 2023, equation 5) that makes it cheap in memory: what
waits between forward and backward are the packed bytes, which exist anyway.

The function keeps the *packed tensor object*, as an attribute and not by ``save_for_backward``.
Engines free the bytes after forward and gather them again before backward: FSDP2 resizes the
storage, ZeRO-3 exchanges the tensor's data. A view or copy kept here would miss the new bytes, or
pin the old ones in memory; autograd's check of saved tensors would take the refill for a change of
the weight.

On a CPU 16-bit products are computed in float32 and rounded once. Kernels there accumulate in
float32 anyway, and where the processor has no instructions for 16-bit floats, PyTorch's own are 8
(``x W^T``) to 80 times (``dy W``) slower than those for float32.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dist_peft.quant.codec import Codec

__all__ = ["frozen_matmul", "product"]


def frozen_matmul(x: Tensor, packed: Tensor, codec: Codec, in_features: int) -> Tensor:
    """``x W^T`` with ``W = codec.decode(packed)``, differentiable in ``x`` alone.

    Args:
        x: ``[..., in]``, any float type; the weight is decoded to this type.
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
        weight = _decode(packed, codec, in_features, x.dtype)
        return product(functional.linear, x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        weight = _decode(ctx.packed, ctx.codec, ctx.in_features, grad.dtype)
        return product(torch.matmul, grad, weight), None, None, None


def product(multiply: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    """``multiply(x, weight)``, two matrices of one type; see the module."""
    if x.device.type == "cpu" and x.dtype.itemsize == 2:
        return multiply(x.float(), weight.float()).to(x.dtype)
    return multiply(x, weight)


def _decode(packed: Tensor, codec: Codec, in_features: int, dtype: torch.dtype) -> Tensor:
    # reading a storage of size 0 would crash the process
    if packed.numel() and not packed.untyped_storage().nbytes():
        raise RuntimeError(
            f"the packed weight {list(packed.shape)} has no storage: its engine freed it and did "
            f"not gather it again"
        )
    return codec.decode(packed, in_features, dtype)
