"""Bottleneck adapters: a small MLP on a sublayer's output, and trainable layer norms.

Houlsby et al. 2019 (section 2.1); Pfeiffer et al. 2021; the parallel form of He et al. 2022. With
``x`` the residual stream before a sublayer (attention or MLP) and ``f`` the sublayer's output::

    x -+- norm -- sublayer -- f --(+)--(+)-- next        down [m, d], up [d, m], m = d / reduction
       |                      |    |    |
       |                      +- adapter |               adapter(h) = s up(act(down(h)))
       +---------------------------------+

    f' = f + adapter(h)       houlsby   h = f            after attention and after the MLP
                              pfeiffer  h = x + f        after the MLP
                              parallel  h = x            parallel to the MLP

These equal AdapterHub's ``double_seq_bn``, ``seq_bn`` and ``par_bn`` in a decoder whose
norms stand before the sublayers: ``h`` is the raw stream. In the authors' own models, BERT and its
kin, the norm follows the residual sum. There it serves twice, for ``pfeiffer``'s ``h`` and for the
sublayer's result::

    x -+- sublayer -- f -+----------------(+)--(+)-- norm -- next
       |                 |                 |    |
       |                (+)- norm - adapter+    |            pfeiffer  h = norm(x + f)
       +-----------------+----------------------+

``up`` follows a nonlinearity, so that no weight of the base could take the adapter in: it cannot be
merged.

The start is near the identity: ``up`` is small or zero, biases are zero (``init_rows``).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_peft.core.seeds import derive_seed
from dist_peft.core.span import Span
from dist_peft.model.adapter_module import SwitchableLayer
from dist_peft.model.parameter_override import override_parameters
from dist_peft.model.sample_dropout import SampleDropout
from dist_peft.quant.trainable_products import apply_linear

__all__ = [
    "ACTIVATIONS",
    "BottleneckLayer",
    "BottleneckSpec",
    "Reads",
    "Rows",
    "TrainableNorm",
    "add_meta_parameters",
]

Reads = Literal["output", "sum", "stream", "normed"]
"""The adapter's input ``h``: ``f``, ``x + f``, ``x`` or ``norm(x + f)``."""

Rows = Callable[[Span], Tensor]
"""Gives the asked rows of a parameter's start value."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "swish": F.silu,
    "tanh": torch.tanh,
    "leakyrelu": F.leaky_relu,
}
"""By AdapterHub's names."""


@dataclass(frozen=True)
class BottleneckSpec:
    """Settings of one adapter.

    Attributes:
        hidden: ``d``.
        bottleneck: ``m``.
        activation: a key of ``ACTIVATIONS``.
        scaling: ``s``.
        reads: ``h``.
        init: how it starts, see ``BottleneckLayer.init_rows``.
        arithmetic: type in which it computes.
        seed: of the run; start values also depend on the path.
    """

    hidden: int
    bottleneck: int
    activation: str
    scaling: float
    reads: Reads
    init: Literal["bert", "houlsby", "mam_adapter"]
    arithmetic: torch.dtype
    seed: int


class BottleneckLayer(SwitchableLayer):
    """The adapter of one sublayer: down-projection, nonlinearity, up-projection, residual.

    Args:
        base: the module that returns ``f``, after which this one is loaded.
        path: this module's name in the model.
        spec: settings of the adapter.
        dropout: on ``adapter(h)``.
        norm: of the base, where ``h`` is normed.
        train: whether the parameters are trainable.
        device: where the (unfilled) parameters are made.

    Attributes:
        down_weight, down_bias: ``[m, d]``, ``[m]``.
        up_weight, up_bias: ``[d, m]``, ``[d]``.
        shapes: of the parameters, by name.
    """

    down_weight: nn.Parameter
    down_bias: nn.Parameter
    up_weight: nn.Parameter
    up_bias: nn.Parameter

    def __init__(
        self,
        base: nn.Module,
        path: str,
        spec: BottleneckSpec,
        dropout: SampleDropout,
        norm: nn.Module | None = None,
        train: bool = True,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.path, self.spec, self.dropout = path, spec, dropout
        self._base, self._norm = (base,), (norm,)  # no children: they are the block's
        d, m = spec.hidden, spec.bottleneck
        self.shapes = {
            "down_weight": (m, d),
            "down_bias": (m,),
            "up_weight": (d, m),
            "up_bias": (d,),
        }
        self._given: dict[str, Rows] = {}
        add_meta_parameters(self, self.shapes, device, train)

    @property
    def base(self) -> nn.Module:
        return self._base[0]

    def forward(self, output: Tensor, stream: Tensor | None = None) -> Tensor:
        """``f`` [..., d] and ``x`` [..., d] -> ``f'`` in the type of ``f``.

        Args:
            output: ``f``.
            stream: ``x``; may be absent where the adapter reads ``f`` alone.
        """
        if not self.is_enabled:
            return output
        f = output.to(self.spec.arithmetic)
        return (
            f + self.dropout(self.compute_residual(self.select_adapter_input(output, stream)))
        ).to(output.dtype)

    def select_adapter_input(self, output: Tensor, stream: Tensor | None = None) -> Tensor:
        """``f`` and ``x`` -> ``h`` [..., d] in the arithmetic type. See ``forward``."""
        spec, dtype = self.spec, self.spec.arithmetic
        if spec.reads == "output":
            return output.to(dtype)
        assert stream is not None, f"{self.path}: no residual stream"
        if spec.reads == "stream":
            return stream.to(dtype)
        total = stream.to(dtype) + output.to(dtype)
        if spec.reads == "sum":
            return total
        norm = self._norm[0]
        assert norm is not None, f"{self.path}: no norm"
        normed: Tensor = norm(total.to(output.dtype))
        return normed.to(dtype)

    def compute_residual(self, h: Tensor) -> Tensor:
        """``h`` [..., d] -> ``adapter(h)`` [..., d], before dropout, in the arithmetic type."""
        down = apply_linear(h, self.down_weight, self.down_bias)
        inner = ACTIVATIONS[self.spec.activation](down)
        up = apply_linear(inner, self.up_weight, self.up_bias)
        return up * self.spec.scaling

    def load_initial_values(self, tensors: Mapping[str, Tensor]) -> None:
        """Whole parameters by own name, to start from instead of random ones."""
        self._given = {name: partial(_select_rows, tensor) for name, tensor in tensors.items()}

    def load_initial_rows(self, rows: Mapping[str, Rows]) -> None:
        """As ``load_initial_values``, with readers called when the rows are needed."""
        self._given = dict(rows)

    def init_rows(self, name: str, span: Span) -> Tensor:
        """Return initial values of rows ``span`` of parameter ``name``.

        Biases are zero. ``bert``: both matrices normal with deviation 0.02. ``houlsby``: with 0.01,
        cut at two deviations. ``mam_adapter``: ``down`` Kaiming-uniform as LoRA's A, ``up`` zero.
        """
        if name in self._given:
            return self._given[name](span).float()
        shape, init = self.shapes[name], self.spec.init
        if name.endswith("bias") or (init == "mam_adapter" and name == "up_weight"):
            return torch.zeros(len(span), *shape[1:])
        generator = torch.Generator().manual_seed(derive_seed(self.spec.seed, self.path, name))
        value = torch.empty(shape)
        if init == "mam_adapter":
            nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
        elif init == "bert":
            value.normal_(std=0.02, generator=generator)
        else:
            nn.init.trunc_normal_(value, std=0.01, a=-0.02, b=0.02, generator=generator)
        return value[span.slice].clone()

    def extra_repr(self) -> str:
        spec = self.spec
        return f"{spec.hidden} -> {spec.bottleneck} -> {spec.hidden}, reads={spec.reads}"


class TrainableNorm(SwitchableLayer):
    """A layer norm with trainable weights: those of the base plus a trained change, in float32.

    The change starts at zero, so that it needs nothing of the base's files, and weight decay pulls
    towards the base. All is computed in float32 (the sum too: near 1, bfloat16 has steps of 0.8 %),
    whatever the family's formula: while ``base`` computes, the sums stand in for its weights.

    Args:
        base: the norm; ``weight`` and maybe ``bias`` are its parameters.
        device: where the (unfilled) parameters are made.

    Attributes:
        weight_change, bias_change: shaped like the base's.
        shapes: of them, by name.
    """

    def __init__(self, base: nn.Module, device: torch.device | str = "meta") -> None:
        super().__init__()
        self.base = base
        own = base.named_parameters(recurse=False)
        self.shapes = {f"{name}_change": tuple(p.shape) for name, p in own}
        self._given: dict[str, Tensor] = {}
        add_meta_parameters(self, self.shapes, device)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., d] -> [..., d] in its type."""
        if not self.is_enabled:
            unchanged: Tensor = self.base(x)
            return unchanged
        names = [name.removesuffix("_change") for name in self.shapes]
        sums = {n: getattr(self.base, n).float() + getattr(self, f"{n}_change") for n in names}
        with override_parameters(self.base, sums):
            y: Tensor = self.base(x.float())
        return y.to(x.dtype)

    def load_initial_values(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the changes that ``init_rows`` returns instead of zeros, by own name."""
        self._given = dict(tensors)

    def init_rows(self, name: str, span: Span) -> Tensor:
        """Return the values of ``load_initial_values``, else zeros: the norm of the base."""
        if name in self._given:
            return self._given[name][span.slice].float()
        return torch.zeros(len(span), *self.shapes[name][1:])


def add_meta_parameters(
    module: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    device: torch.device | str,
    train: bool = True,
) -> None:
    """Register unfilled float32 parameters of these shapes, by own name."""
    for name, shape in shapes.items():
        value = torch.empty(shape, dtype=torch.float32, device=device)
        module.register_parameter(name, nn.Parameter(value, requires_grad=train))


def _select_rows(tensor: Tensor, span: Span) -> Tensor:
    return tensor[span.slice]
