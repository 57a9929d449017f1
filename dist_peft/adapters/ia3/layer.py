"""IA3's layer: a frozen linear and one trainable vector that rescales its output or its input.

IA3 (Liu et al. 2022, section 3.3)::

    output:  y = l * (W x + b)      l [out]     keys and values of attention
    input:   y = W (l * x) + b      l [in]      the last linear of a feed-forward block

``l`` is initialized to 1, so that training starts from exactly the base's function. It stays
float32 in the product, whose result is rounded once: near 1 the steps of bfloat16 are 2^-7.
"""

import torch
from torch import Tensor, nn

from dist_peft.core.span import Span
from dist_peft.model.adapter_module import JoinedForm, SwitchableLayer
from dist_peft.model.frozen_linear import FrozenLinear

__all__ = ["Ia3Linear"]


class Ia3Linear(SwitchableLayer):
    """A ``FrozenLinear`` whose input or output is multiplied by a trainable vector.

    Args:
        base: the wrapped linear.
        path: its name in the model.
        rescales_input: whether ``l`` multiplies the input instead of the output.
        device: where the (unfilled) parameter is made.

    Attributes:
        ia3_l: ``[in]`` or ``[out]``, float32.
        shapes: the whole shape of each own parameter.
    """

    ia3_l: nn.Parameter

    def __init__(
        self,
        base: FrozenLinear,
        path: str,
        *,
        rescales_input: bool,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.base, self.path, self.rescales_input = base, path, rescales_input
        size = base.in_features if rescales_input else base.out_features
        self.shapes: dict[str, tuple[int, ...]] = {"ia3_l": (size,)}
        self.ia3_l = nn.Parameter(torch.empty(size, dtype=torch.float32, device=device))

    @property
    def joined_form(self) -> JoinedForm:
        return "rescaling"

    def forward(self, x: Tensor, *, is_change: bool = False) -> Tensor:
        """``x`` [..., in] -> [..., out] in the type of the base's output.

        Args:
            is_change: return ``l * x`` alone: ``x`` is the input or the output of the base.
        """
        if is_change:
            return self._rescale(x)
        if self.rescales_input and self.is_enabled:
            rescaled: Tensor = self.base(self._rescale(x))
            return rescaled
        y: Tensor = self.base(x)
        return self._rescale(y) if self.is_enabled else y

    def _rescale(self, x: Tensor) -> Tensor:
        # type promotion multiplies in float32 without a float32 copy of the activations
        return (x * self.ia3_l).to(x.dtype)

    def init_rows(self, name: str, span: Span) -> Tensor:
        """Return ones: the rescaling that changes nothing."""
        assert name == "ia3_l", f"{self.path} has no parameter {name}"
        return torch.ones(len(span))

    def extra_repr(self) -> str:
        return f"rescales={'input' if self.rescales_input else 'output'}"
