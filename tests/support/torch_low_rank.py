"""The kernels of ``quant.device_low_rank`` in torch: as slow references, and to stand for them on a
CPU, where Triton's interpreter takes seconds for a step."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

from torch import Tensor

from dist_peft.adapters.lora import layer
from dist_peft.quant import low_rank_linear
from dist_peft.quant.low_rank_linear import DropoutKeys

__all__ = ["use_torch_kernels"]


def keep(x: Tensor, keys: DropoutKeys | None) -> Tensor:
    if keys is None:
        return x
    words = (keys.a * keys.b + keys.d).square() + keys.c
    return (x * (words >= keys.threshold)).div(keys.probability)


def project_rows(
    x: Tensor,
    factor: Tensor,
    scaling: float,
    keys: DropoutKeys | None = None,
    out: Tensor | None = None,
) -> Tensor:
    inner = ((keep(x, keys).float() @ factor.to(x.dtype).float().T) * scaling).to(x.dtype)
    return inner if out is None else out.copy_(inner)


def expand_rows(
    y: Tensor, inner: Tensor, factor: Tensor, keys: DropoutKeys | None = None
) -> Tensor:
    change = inner.float() @ factor.to(y.dtype).float().T
    return y.copy_(y.float() + (change if keys is None else keep(change.to(y.dtype), keys).float()))


def sum_outer(inner: Tensor, x: Tensor, gradient: Tensor, keys: DropoutKeys | None = None) -> None:
    gradient.copy_(inner.float().T @ keep(x, keys).float())


@contextmanager
def use_torch_kernels() -> Iterator[None]:
    """Fuse linears with LoRA of any type on any device, by the functions above."""
    kernels = SimpleNamespace(
        project_rows=project_rows, expand_rows=expand_rows, sum_outer=sum_outer
    )
    with (
        mock.patch.object(layer, "can_fuse_low_rank", return_value=True),
        mock.patch.object(low_rank_linear, "_import_kernels", return_value=kernels),
        mock.patch.dict(os.environ, DIST_PEFT_KERNELS="torch"),
    ):
        yield
