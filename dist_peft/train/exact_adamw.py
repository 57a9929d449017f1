"""AdamW of single IEEE operations, which every cut of a parameter into shards leaves alone.

torch's fused AdamW (CPU) computes eight or sixteen values at a time and the rest of a tensor one
by one, and the two differ: the compiler contracts ``a * b + c`` in one of them. Cut into parts of
three values, a tensor of 10,007 has 5 other parameters and 2,491 other second moments after one
step. Here each operation is one rounding, so that a value's result depends on its operands only
(Loshchilov & Hutter 2019, in the order of torch's)::

    p <- p (1 - lr wd)
    m <- b1 m + (1 - b1) g
    v <- b2 v + (1 - b2) (g g)
    p <- p - (lr / (1 - b1^t)) (m / (sqrt(v) / sqrt(1 - b2^t) + eps))

Square roots are correctly rounded (``quant.exact_math``).
"""

import math
from typing import Any, cast

import torch
from torch import Tensor

from dist_peft.quant.exact_math import exact_sqrt

__all__ = ["ExactAdamW"]


class ExactAdamW(torch.optim.Optimizer):
    """AdamW over plain float32 tensors; ``state`` has ``step``, ``exp_avg`` and ``exp_avg_sq``.

    Args:
        groups: parameters with ``lr``, ``betas``, ``eps`` and ``weight_decay``.
        defaults: of what a group lacks.
    """

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any) -> None:
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None and p.numel()]
            if not parameters:
                continue
            counts = [self.state[p]["step"] for p in parameters]
            torch._foreach_add_(counts, 1)
            numbers = torch.stack(counts).tolist()  # one wait for the device
            for number in sorted(set(numbers)):
                own = [p for p, n in zip(parameters, numbers, strict=True) if n == number]
                if own[0].device.type == "cpu":  # each while it is in the cache
                    for parameter in own:
                        self._update_alone(parameter, group, number)
                else:  # few kernels
                    self._update_together(own, group, number)

    def _update_alone(self, parameter: Tensor, group: dict[str, Any], number: float) -> None:
        """Make update ``number``, from 1, of one parameter: the operations of
        ``_update_together``, one by one."""
        (beta1, beta2), lr = group["betas"], group["lr"]
        grad, state = cast(Tensor, parameter.grad), self.state[parameter]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        if group["weight_decay"]:
            parameter.mul_(1 - lr * group["weight_decay"])
        mean.mul_(beta1).add_(grad * (1 - beta1))
        square.mul_(beta2).add_((grad * grad).mul_(1 - beta2))
        divisor = exact_sqrt(square).div_(math.sqrt(1 - beta2**number)).add_(group["eps"])
        step = torch.div(mean, divisor, out=divisor).mul_(lr / (1 - beta1**number))
        parameter.sub_(step)

    def _update_together(
        self, parameters: list[Tensor], group: dict[str, Any], number: float
    ) -> None:
        """Make update ``number``, from 1, of ``parameters``."""
        (beta1, beta2), lr = group["betas"], group["lr"]
        grads = [cast(Tensor, p.grad) for p in parameters]
        means = [self.state[p]["exp_avg"] for p in parameters]
        squares = [self.state[p]["exp_avg_sq"] for p in parameters]
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_mul_(means, beta1)
        torch._foreach_add_(means, torch._foreach_mul(grads, 1 - beta1))
        products = torch._foreach_mul(grads, grads)
        torch._foreach_mul_(products, 1 - beta2)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_add_(squares, products)
        divisors = [exact_sqrt(square) for square in squares]
        torch._foreach_div_(divisors, math.sqrt(1 - beta2**number))
        torch._foreach_add_(divisors, group["eps"])
        steps = torch._foreach_div(means, divisors)
        torch._foreach_mul_(steps, lr / (1 - beta1**number))
        torch._foreach_sub_(parameters, steps)
