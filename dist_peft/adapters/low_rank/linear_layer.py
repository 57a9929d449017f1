"""A frozen linear and a trained change of its output, the shape that most methods share::

    y = W x + b + change(drop(x))

Factors are float32; the change is computed in the arithmetic type, ``y`` has that of the base's
output.
"""

from abc import abstractmethod

from torch import Tensor

from dist_peft.adapters.low_rank.module import LowRankModule, LowRankSpec
from dist_peft.model.adapter_module import JoinedForm
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.sample_dropout import SampleDropout

__all__ = ["LowRankLinear"]


class LowRankLinear(LowRankModule):
    """A ``FrozenLinear`` with a change.

    Args:
        base: the wrapped linear.
        path: its name in the model.
        spec: settings of the module.
        dropout: on the adapter's input.
    """

    def __init__(
        self, base: FrozenLinear, path: str, spec: LowRankSpec, dropout: SampleDropout
    ) -> None:
        super().__init__(path, spec)
        self.base, self.dropout = base, dropout

    @property
    def joined_form(self) -> JoinedForm:
        return "change"

    def forward(self, x: Tensor, *, is_change: bool = False) -> Tensor:
        """``x`` [..., in] -> [..., out] in the type of the base's output.

        Args:
            is_change: return the change alone, without the base's product.
        """
        if is_change:
            return self._compute_update(x)
        if not self.is_enabled:
            disabled: Tensor = self.base(x)
            return disabled
        # The change comes first: recomputation under activation checkpointing stops at the last
        # tensor that backward needs, and the frozen product keeps none.
        change = self._compute_update(x)
        y: Tensor = self.base(x)
        return (y + change).to(y.dtype)

    @abstractmethod
    def _compute_update(self, x: Tensor) -> Tensor:
        """The change ``[..., out]`` in the arithmetic type, from ``x`` [..., in] before dropout."""
