"""Shared by the layers of low-rank methods: parameters, their initialization, and the product.

Parameters are float32 and cast to the arithmetic type in forward; no engine needs mixed precision.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_peft.core.seeds import derive_seed
from dist_peft.core.span import Span
from dist_peft.model.adapter_module import SwitchableLayer
from dist_peft.quant.trainable_products import apply_low_rank

__all__ = ["LowRankModule", "LowRankSpec"]


@dataclass(frozen=True)
class LowRankSpec:
    """Settings of one adapted module.

    Attributes:
        r: rank.
        scaling: ``s``.
        arithmetic: type in which the adapter computes.
        seed: of the run; start values also depend on the module's path.
    """

    r: int
    scaling: float
    arithmetic: torch.dtype
    seed: int


class LowRankModule(SwitchableLayer, ABC):
    """A wrapper with factors, whose product starts at zero.

    Attributes:
        path: the wrapped module's name in the model.
        shapes: the whole shape of each own parameter.
        starts_at_zero: the parameter whose zeros make the start the base's own function.
    """

    starts_at_zero: str

    def __init__(self, path: str, spec: LowRankSpec) -> None:
        super().__init__()
        self.path, self.spec = path, spec
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._starts: dict[str, tuple[Span, Tensor]] = {}

    def _add_meta_parameter(
        self, name: str, shape: tuple[int, ...], device: torch.device | str, train: bool
    ) -> None:
        self.shapes[name] = shape
        value = torch.empty(shape, dtype=torch.float32, device=device)
        self.register_parameter(name, nn.Parameter(value, requires_grad=train))

    def init_rows(self, name: str, span: Span) -> Tensor:
        """Return initial values of rows ``span`` of parameter ``name``.

        Releases the values that ``prepare_base_rows`` kept for this parameter.
        """
        if name in self._starts:
            known, value = self._starts.pop(name)
            assert known.intersect(span) == span, f"{self.path}.{name}: {span} outside of {known}"
            return value[span.shifted_by(-known.start).slice].clone()  # others start from it too
        if name == self.starts_at_zero:
            return torch.zeros(len(span), *self.shapes[name][1:])
        return self._draw_initial_values(name)[span.slice].clone()

    def copy_starts(self, other: "LowRankModule") -> None:
        """Begin with the values that ``prepare_base_rows`` of ``other`` has computed."""
        self._starts = dict(other._starts)

    @abstractmethod
    def _draw_initial_values(self, name: str) -> Tensor:
        """The whole start value of a parameter that does not start at zero."""

    def _make_generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.spec.seed, self.path, name))

    def _multiply_factors(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """``s B A x`` in the arithmetic type: ``x`` [..., columns of A] -> [..., rows of B]."""
        return apply_low_rank(x, A, B, self.spec.scaling, self.spec.arithmetic)

    def extra_repr(self) -> str:
        return f"r={self.spec.r}, scaling={self.spec.scaling:g}"
