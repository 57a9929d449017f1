"""The encoder of a method with virtual tokens: one module that owns everything the method trains.

Whatever the method, training computes ``encode(parameters)`` once a forward, in float32, and the
deployed value is that same function's, computed once for good. So ``encode`` takes the
parameters as an argument: the module's own (which engines gather and shard) or gathered copies.

All parameters belong to this one module, whose ``forward`` is called: an engine that gathers before
a module's forward and releases after it (FSDP2, ZeRO-3) has them whole in between.

The virtual tokens are the same for every row of a step, so their dropout depends on the step alone.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_peft.core.seeds import derive_seed
from dist_peft.core.span import Span
from dist_peft.model.adapter_module import SwitchableLayer
from dist_peft.model.frozen_embedding import FrozenEmbedding
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout

__all__ = [
    "PATH",
    "Drop",
    "ParameterInit",
    "PromptEncoder",
    "apply_linear",
    "init_linear_parameters",
    "keep_all_values",
]

PATH = "prompt_encoder"
"""Attribute of the model that holds the encoder."""


Drop = Callable[[int, Tensor], Tensor]
"""Dropout number ``i`` on a tensor."""


def keep_all_values(number: int, x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class ParameterInit:
    """Shape of a parameter and where it starts: normal, or uniform within ``+- bound``."""

    shape: tuple[int, ...]
    bound: float | None = None


def init_linear_parameters(name: str, inputs: int, outputs: int) -> dict[str, ParameterInit]:
    """``name.weight`` and ``name.bias``, without the dot, as ``nn.Linear`` starts them."""
    bound = 1 / math.sqrt(inputs)
    return {
        f"{name}_weight": ParameterInit((outputs, inputs), bound),
        f"{name}_bias": ParameterInit((outputs,), bound),
    }


def apply_linear(x: Tensor, parameters: Mapping[str, Tensor], name: str) -> Tensor:
    """``nn.Linear`` called ``name`` on ``x``."""
    return F.linear(x, parameters[f"{name}_weight"], parameters[f"{name}_bias"])


class PromptEncoder(SwitchableLayer, ABC):
    """The trainable part of the model: parameters from which the virtual tokens are computed.

    Args:
        base: the model's input embedding.
        starts: every parameter by name.
        position: the run's seed, and the inputs of dropout.
        dropout: probability.
        dropouts: how many places have one.
        device: where the (unfilled) parameters are made.
    """

    def __init__(
        self,
        base: nn.Module,
        starts: Mapping[str, ParameterInit],
        position: DropoutPosition,
        *,
        dropout: float = 0.0,
        dropouts: int = 0,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.starts, self.seed = dict(starts), position.seed
        self.dropouts = nn.ModuleList(
            SampleDropout(dropout, f"{PATH}.{number}", position) for number in range(dropouts)
        )
        self._base = (base,)  # not a child: it is the model's
        for name, start in starts.items():
            value = torch.empty(start.shape, dtype=torch.float32, device=device)
            self.register_parameter(name, nn.Parameter(value))

    @property
    def base(self) -> nn.Module:
        """The input embedding, after which this module is loaded."""
        return self._base[0]

    @property
    def base_dtype(self) -> torch.dtype:
        """Type of the input embedding's output."""
        base = self.base
        return base.dtype if isinstance(base, FrozenEmbedding) else cast(Tensor, base.weight).dtype

    def forward(self) -> Tensor:
        """The virtual tokens, float32 ``[num_virtual_tokens, ...]``."""
        parameters = {name: getattr(self, name) for name in self.starts}
        return self.encode_prompt(parameters, lambda number, x: self.dropouts[number](x))

    @abstractmethod
    def encode_prompt(
        self, parameters: Mapping[str, Tensor], drop: Drop = keep_all_values
    ) -> Tensor:
        """The virtual tokens as a function of the parameters; without dropout, as deployed."""

    def init_rows(self, name: str, span: Span) -> Tensor:
        """Return initial values of rows ``span`` of parameter ``name``."""
        start = self.starts[name]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, PATH, name))
        value = torch.empty(start.shape)
        if start.bound is None:
            value.normal_(generator=generator)
        else:
            value.uniform_(-start.bound, start.bound, generator=generator)
        return value[span.slice].clone()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(start.shape)}" for name, start in self.starts.items())
