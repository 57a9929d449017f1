"""LoRA linears that read the same input: queries, keys and values; gate and up.

Where the linears are fused with their changes (``quant.low_rank_linear``), the first one that is
called computes the products of all, and the others take theirs. They are found by their names, and
an input is the same where it is the same tensor object, unchanged: in a model that calls them
with different inputs, or in another order, each computes its own.

They stay apart with dropout, with different ranks or scalings, above ``LARGEST_RANK`` in all, and
where a linear has forward hooks: DeepSpeed's stage 3 gathers factors for a linear's own call.
"""

import weakref
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from dist_peft.adapters.lora.layer import LoraLinear
from dist_peft.quant.low_rank_linear import LARGEST_RANK, apply_frozen_low_rank

__all__ = ["SIBLING_NAMES", "Siblings", "link_siblings"]

SIBLING_NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names within a module, in the order in which models call them."""


class Siblings:
    """Linears with one input, called in their order.

    Args:
        layers: of one rank and scaling.
    """

    def __init__(self, layers: Sequence[LoraLinear]) -> None:
        self.layers = list(layers)
        self._input: weakref.ref[Tensor] | None = None
        self._version = 0
        self._products: dict[int, Tensor] = {}

    def multiply(self, layer: LoraLinear, x: Tensor) -> Tensor | None:
        """Return the product of ``layer`` without its bias; None: it has to be made alone."""
        place = next(n for n, one in enumerate(self.layers) if one is layer)
        if place == 0:
            self._products.clear()
            if not self._are_together():
                return None
            linears = [one.describe_product() for one in self.layers]
            products = apply_frozen_low_rank(x, linears, layer.spec.scaling)
            self._input, self._version = weakref.ref(x), x._version
            self._products = dict(enumerate(products))
        elif self._input is None or self._input() is not x or self._version != x._version:
            return None
        return self._products.pop(place, None)

    def _are_together(self) -> bool:
        """Whether all compute in the same way now, and nothing waits for their calls."""
        return all(
            layer.is_enabled
            and (layer.dropout.p == 0 or not layer.training)
            and not _has_hooks(layer)
            and not _has_hooks(layer.base)
            for layer in self.layers
        )


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)


def link_siblings(layers: Mapping[str, nn.Module]) -> None:
    """Let linears that read the same input share its products.

    Args:
        layers: adapted modules by their names in the model.
    """
    for names in SIBLING_NAMES:
        for path in layers:
            parent, dot, name = path.rpartition(".")
            if name != names[0]:
                continue
            found = [layers.get(f"{parent}{dot}{other}") for other in names]
            linears = [one for one in found if type(one) is LoraLinear and one.is_plain]
            specs = {(one.spec.r, one.spec.scaling, one.base.in_features) for one in linears}
            if len(linears) != len(names) or len(specs) != 1:
                continue
            if len(linears) * linears[0].spec.r <= LARGEST_RANK:
                group = Siblings(linears)
                for linear in linears:
                    linear.siblings = group
