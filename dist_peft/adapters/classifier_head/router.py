"""The routers of a mixture, trained whole next to any method on linears and experts.

A router scores the experts for each token, ``x W_r^T`` with ``W_r`` [E, H], and its product is a
small share of the model: it is trained itself, as float32 values that are rounded where they
compute, like a head (``adapters.classifier_head``). Gradients come through the weights of the
chosen experts' outputs, and from the load-balancing loss (Fedus et al. 2021, "Switch Transformers",
equations 4 to 6), which the model's own module of ``transformers`` computes from the scores of all
layers::

    aux = E sum over e of  f_e p_e      f_e: tokens that chose e, by layer and token
                                        p_e: mean probability of e
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import Tensor, nn

from dist_peft.adapters.classifier_head.around_method import AroundMethod
from dist_peft.adapters.classifier_head.trained_module import TrainedModule
from dist_peft.adapters.protocol import (
    Adapter,
    PublicAdapter,
    PublicHead,
    collect_gathered_parameters,
)
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.experts import FrozenExperts

__all__ = ["RouterAdapter", "RouterLoss", "RouterPart", "find_routers"]

_FUNCTION = "load_balancing_loss_func"
"""Name of the loss in the modules of ``transformers`` that have it."""


@dataclass
class RouterLoss:
    """The auxiliary loss of a model's routers.

    Attributes:
        weight: its factor; 0: it is not computed.
        function: of ``transformers``: logits of the layers, experts, experts a token, mask.
        experts, chosen: their numbers.
        logits: of the routers that have computed since ``collect``; None: not collected.
    """

    weight: float = 0.0
    function: Callable[..., Tensor] | None = None
    experts: int = 0
    chosen: int = 0
    logits: list[Tensor] | None = field(default=None, repr=False)

    def compute(self, logits: list[Tensor], mask: Tensor | None) -> Tensor:
        """Return the loss, unweighted.

        Args:
            logits: of each layer, ``[B * S, E]``.
            mask: 1 for tokens that count, 0 for padding, ``[B, S]``; None: all do.
        """
        assert self.function is not None
        return self.function(tuple(logits), self.experts, self.chosen, mask)


class RouterPart(TrainedModule):
    """A router.

    Args:
        base, path: see ``TrainedModule``.
        loss: shared by the routers of a model.
    """

    def __init__(self, base: nn.Module, path: str, loss: RouterLoss) -> None:
        super().__init__(base, path)
        self.loss = loss

    def forward(self, hidden: Tensor, *others: Any, **keywords: Any) -> Any:
        """Return the outputs of ``base``."""
        outputs = self.compute_rounded(hidden.dtype, hidden, *others, **keywords)
        if self.loss.logits is not None:
            self.loss.logits.append(outputs[0])
        return outputs

    def __getattr__(self, name: str) -> Any:
        """Attributes of the router, which blocks read."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self._modules.get("base")
            if base is None or name in base._parameters:
                raise
            return getattr(base, name)

    def init_rows(self, name: str, span: Span) -> Tensor:
        """A router's parameters are in the base's files."""
        raise RuntimeError(f"{self.path}.{name} is not in the base's files")


class RouterAdapter(AroundMethod):
    """An ``Adapter`` that trains the routers of a mixture together with its method.

    Args:
        trunk: the adapter of the rest of the model.
        weight: of the auxiliary loss; None: that of the base's configuration.
    """

    def __init__(self, trunk: Adapter, weight: float | None) -> None:
        self.trunk, self._weight = trunk, weight
        self.parts: dict[str, RouterPart] = {}

    def attach_to_model(self, model: nn.Module) -> None:
        """Attach the method, and make the routers trainable.

        Raises:
            UserError: the model has no routers that are known, or no loss for them.
        """
        routers = find_routers(model)
        if not routers:
            raise UserError(
                "adapter.train_router: base.path has no router that is known, a sibling of its "
                "experts with a row for each of them; leave it out"
            )
        loss = _make_loss(model, self._weight)
        self.trunk.attach_to_model(model)
        for path in routers:
            parent, _, own = path.rpartition(".")
            holder = model.get_submodule(parent)
            part = self.parts[path] = RouterPart(getattr(holder, own), path, loss)
            setattr(holder, own, part)

    def get_lr_scale(self, name: str) -> float:
        """Return 1 for routers. See ``Adapter``."""
        return 1.0 if self._is_router_parameter(name) else self.trunk.get_lr_scale(name)

    def to_public_adapter(self, tensors: Mapping[str, Tensor], base: str) -> PublicAdapter:
        """The method's form with the routers in it. See ``Adapter``."""
        others = {n: value for n, value in tensors.items() if not self._is_router_parameter(n)}
        shapes = {path: part.shapes for path, part in self.parts.items()}
        whole = collect_gathered_parameters(tensors, shapes)
        mine = {f"{path}.{name}": v for path, own in whole.items() for name, v in own.items()}
        return replace(self.trunk.to_public_adapter(others, base), head=PublicHead((), mine))

    def _is_router_parameter(self, name: str) -> bool:
        return name.rpartition(".")[0] in self.parts


def find_routers(model: nn.Module) -> list[str]:
    """Return the paths of routers: siblings of experts whose own matrix has a row for each."""
    found = []
    for path, module in model.named_modules():
        children = dict(module.named_children())
        experts = next((c for c in children.values() if isinstance(c, FrozenExperts)), None)
        for name, child in children.items() if experts is not None else ():
            weight = child._parameters.get("weight")
            if experts is not None and weight is not None and weight.dim() == 2:
                found += [f"{path}.{name}"] * (len(weight) == experts.num_experts)
    return found


def _make_loss(model: nn.Module, weight: float | None) -> RouterLoss:
    text: Any = cast(Any, model).config.get_text_config()
    function = getattr(sys.modules[type(model).__module__], _FUNCTION, None)
    if weight is None:
        weight = 0.0 if function is None else getattr(text, "router_aux_loss_coef", None) or 0.0
    if not weight:
        return RouterLoss()
    chosen = getattr(text, "num_experts_per_tok", None)
    if function is None or chosen is None:
        raise UserError(
            f"adapter.router_aux_loss: transformers has no load-balancing loss for "
            f"{type(model).__name__}; set it to 0"
        )
    experts = next(m.num_experts for m in model.modules() if isinstance(m, FrozenExperts))
    return RouterLoss(weight, function, experts, int(chosen))
