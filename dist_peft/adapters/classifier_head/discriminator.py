"""The discriminator of domain-adversarial training (Ganin et al. 2016, "Domain-Adversarial Training
of Neural Networks", JMLR 17).

It sees the pooled state that the last part of a classification head classifies, and tells the
domains apart; in the backward pass its gradient is reversed where it enters the state::

    f  pooled state [B, H]  ---------->  last part of the head      class logits
       `-- R(f) ---> relu(U R(f) + c) ---> V . + d                  domain logits [B, D]

    R(f) = f        dR/df = -strength I

so that U, V, c and d minimize the loss of domains, and everything before ``f`` maximizes it. Of a
head that takes all states [B, S, H] (decoders) ``f`` is that of the last token. Arithmetic and
parameters are float32.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_peft.core.seeds import derive_seed
from dist_peft.core.span import Span

__all__ = ["DomainDiscriminator", "reverse_gradient"]


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return state.view_as(state)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * -ctx.strength, None


def reverse_gradient(state: Tensor, strength: float) -> Tensor:
    """Return ``state``, whose gradient will be multiplied by ``-strength``."""
    reversed_: Tensor = _ReverseGradient.apply(state, strength)
    return reversed_


class DomainDiscriminator(nn.Module):
    """Two linear layers with a ReLU between them; an ``AdapterModule``.

    Args:
        path: of the part of the head that it belongs to; with ``seed`` it decides the
            initialization.
        in_features: size of the pooled state.
        hidden_size: units of the hidden layer.
        domains: number of domains.

    Attributes:
        strength: factor of the reversed gradient.
        last_tokens: long [B], where the state of each row is in a state [B, S, H].
        logits: of the batch computed last, float32 [B, domains], with its graph; set by its caller.
    """

    hidden_weight: nn.Parameter
    hidden_bias: nn.Parameter
    output_weight: nn.Parameter
    output_bias: nn.Parameter

    def __init__(
        self, path: str, in_features: int, hidden_size: int, domains: int, *, seed: int
    ) -> None:
        super().__init__()
        self.base = nn.Identity()
        self.path, self.seed = path, seed
        self.shapes = {
            "hidden_weight": (hidden_size, in_features),
            "hidden_bias": (hidden_size,),
            "output_weight": (domains, hidden_size),
            "output_bias": (domains,),
        }
        for name, shape in self.shapes.items():
            value = torch.empty(shape, dtype=torch.float32, device="meta")
            self.register_parameter(name, nn.Parameter(value))
        self.strength = 0.0
        self.last_tokens: Tensor | None = None
        self.logits: Tensor | None = None

    def forward(self, state: Tensor) -> Tensor:
        """Return the domain logits [B, domains] of ``state`` [B, H] or [B, S, H]."""
        pooled = state
        if state.dim() == 3:
            places = self.last_tokens
            if places is None or len(places) != len(state):
                places = torch.full((len(state),), state.shape[1] - 1)
            pooled = state[torch.arange(len(state), device=state.device), places.to(state.device)]
        f = reverse_gradient(pooled.float(), self.strength)
        hidden = functional.relu(functional.linear(f, self.hidden_weight, self.hidden_bias))
        return functional.linear(hidden, self.output_weight, self.output_bias)

    def init_rows(self, name: str, span: Span) -> Tensor:
        """Return rows of the initial value: uniform as in ``nn.Linear``, biases 0."""
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.zeros(len(span))
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.path, name))
        bound = 1 / math.sqrt(shape[1])
        value = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        return value[span.slice].clone()
