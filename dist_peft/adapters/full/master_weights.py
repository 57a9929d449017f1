"""Trainable parameters of the base: float32 masters, cast where they compute.

Mixed precision (Micikevicius et al. 2018): an update of a thousandth of a weight is lost in
bfloat16, whose steps are 1/256 to 1/128 of it. So trainable weights are stored in float32, sharded
by rows like everything, and each forward computes with a rounded copy::

    master (float32) --cast--> copy (compute type) --module's own forward--> y
       ^                                                                             |
       +--------------------- gradient, float32, of the copy's ----------------------+

A merge in the compute type therefore writes exactly the weights that training computed with.

A linear keeps its master, not the copy, for backward, where it casts once more: only
parameters that exist anyway are kept between the two (the idea of ``quant.frozen_matmul``, with a
gradient for ``W``).

In the steps in which it is frozen (``TrainableSteps``) a parameter computes without a gradient, so
that no optimizer touches it, and nothing below it is computed in backward for its sake.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dist_peft.core.trainable_steps import ALWAYS, TrainableSteps
from dist_peft.model.parameter_override import override_parameters
from dist_peft.quant.frozen_matmul import matmul_fp32_accumulate

__all__ = [
    "MasterWeightLinear",
    "MasterWeightModule",
    "StepCounter",
    "TrainableSpec",
    "use_master_weights",
]


@dataclass
class StepCounter:
    """The optimizer steps that are done."""

    step: int = 0


@dataclass(frozen=True)
class TrainableSpec:
    """How a module's own parameters are trained.

    Attributes:
        steps: name of each trainable one -> steps in which it is updated.
        arithmetic: the type to compute in.
        clock: tells the step.
    """

    steps: Mapping[str, TrainableSteps]
    arithmetic: torch.dtype
    clock: StepCounter = field(default_factory=StepCounter)

    def cast_when_trainable(self, module: nn.Module, name: str) -> Tensor:
        """The parameter, detached in the steps in which it is frozen."""
        parameter: Tensor = getattr(module, name)
        is_trained = self.steps.get(name, ALWAYS).includes(self.clock.step)
        return parameter if is_trained else parameter.detach()


class MasterWeightLinear(nn.Module):
    """``y = x W^T + b`` with a trainable plain ``W``, in place of a frozen linear.

    Args:
        weight: ``[out, in]`` float32; may be shared with an embedding. ``[in, out]``, as in the
            files, where ``is_transposed``.
        bias: ``[out]``, or None.
        learning: settings of the trainable rows; a bias that it does not name stays frozen.

    Attributes:
        checkpoint_names: own parameter -> tensor in the base's files.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        learning: TrainableSpec,
        checkpoint_names: dict[str, str],
        is_transposed: bool = False,
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.learning = weight, bias, learning
        self.checkpoint_names, self.is_transposed = checkpoint_names, is_transposed
        self.out_features, self.in_features = weight.shape[:: -1 if is_transposed else 1]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out] in the type of ``x``."""
        how = self.learning
        weight = how.cast_when_trainable(self, "weight")
        y = _linear_with_cast(x.to(how.arithmetic), weight, self.is_transposed)
        if self.bias is not None:
            y = y + how.cast_when_trainable(self, "bias").to(y.dtype)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


class MasterWeightModule(nn.Module):
    """Mixed into a module's class by ``use_master_weights``: its parameters are cast for its
    forward.

    While ``forward`` runs, the copies stand in for the registered parameters.
    """

    learning: TrainableSpec
    cast_names: tuple[str, ...]
    computes: torch.dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward; the output keeps the type that it would have had."""
        how = self.learning
        copies = {
            name: how.cast_when_trainable(self, name).to(how.arithmetic) for name in self.cast_names
        }
        with override_parameters(self, copies):
            if not isinstance(self, nn.Embedding):  # a lookup has no float input to cast
                args = tuple(_cast_tensors(a, how.arithmetic) for a in args)
            y = super().forward(*args, **kwargs)
        return _cast_tensors(y, self.computes)


class _MasterWeightEmbedding(MasterWeightModule):
    """Casts the rows that are looked up, not the table: their gradients add up in float32."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with override_parameters(
            self, {"weight": self.learning.cast_when_trainable(self, "weight")}
        ):
            y: Tensor = super(MasterWeightModule, self).forward(*args, **kwargs)
        return y.to(self.learning.arithmetic).to(self.computes)


def use_master_weights(
    module: nn.Module, masters: Mapping[str, nn.Parameter], learning: TrainableSpec
) -> None:
    """Make ``module`` trainable: ``masters`` replace its own parameters of these names.

    It stays the same object of the same name and, by inheritance, of the same class.
    """
    own = {n: p for n, p in module.named_parameters(recurse=False) if p.is_floating_point()}
    module.__class__ = _make_module_class(cast(Any, type(module)))
    trained = cast(MasterWeightModule, module)
    trained.cast_names = tuple(own)
    trained.computes = next(iter(own.values())).dtype
    trained.learning = learning
    for name, master in masters.items():
        trained.register_parameter(name, master)


@cache
def _make_module_class(kind: Any) -> Any:
    plain = kind.forward is nn.Embedding.forward
    mixin = _MasterWeightEmbedding if plain else MasterWeightModule
    return type(f"Trained{kind.__name__}", (mixin, kind), {})


def _cast_tensors(value: Any, dtype: torch.dtype) -> Any:
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floats else value


def _linear_with_cast(x: Tensor, weight: Tensor, is_transposed: bool) -> Tensor:
    """``x W^T`` in the type of ``x``; ``weight`` is ``W`` or ``W^T``."""
    if weight.dtype == x.dtype:
        return functional.linear(x, weight.T if is_transposed else weight)
    y: Tensor = _CastLinear.apply(x, weight, is_transposed)
    return y


class _CastLinear(torch.autograd.Function):
    """Keeps the weight object, since engines free and refill it (see ``quant.frozen_matmul``)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, is_transposed: bool) -> Tensor:
        ctx.weight, ctx.is_transposed = weight, is_transposed
        ctx.save_for_backward(x)
        cast = weight.to(x.dtype)
        return matmul_fp32_accumulate(functional.linear, x, cast.T if is_transposed else cast)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,), (x,) = grads, ctx.saved_tensors
        dx, dw = None, None
        if ctx.needs_input_grad[0]:
            cast = ctx.weight.to(grad.dtype)
            dx = matmul_fp32_accumulate(torch.matmul, grad, cast.T if ctx.is_transposed else cast)
        if ctx.needs_input_grad[1]:
            rows, columns = grad.flatten(0, -2), x.flatten(0, -2)
            left, right = (columns, rows) if ctx.is_transposed else (rows, columns)
            dw = matmul_fp32_accumulate(torch.matmul, left.T, right).float()
        return dx, dw, None
