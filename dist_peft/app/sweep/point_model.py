"""A loaded model with several adapters, seen as that of one of them.

Everything that trains, evaluates and writes one adapter takes a ``LoadedModel``. A point of a sweep
gets one whose model computes with its adapter alone and has its parameters under the names of an
ordinary run, and whose engine has an optimizer for these::

    whole model   layers.0.q_proj.points.2.lora_A      all adapters, the base once
    point 2       layers.0.q_proj.lora_A               the same parameter
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self, cast

from torch import nn

from dist_peft.adapters.joined.attach import get_alone_name, get_joined_prefix
from dist_peft.adapters.joined.layer import JoinedLayer
from dist_peft.adapters.joined.row_shares import RowShares
from dist_peft.app.model_setup import LoadedModel, ModelSetup
from dist_peft.engine.engine_protocol import trainable_parameters

__all__ = ["PointModel", "call_points_together", "make_point_model"]


class PointModel(nn.Module):
    """The model with the adapter of one point.

    Args:
        whole: with all adapters.
        number: of the point.
        shares: of the model's layers.

    The base's parameters are among those of the first point alone, so that checks of all
    parameters meet each once. Child modules are the layers of the point, so that an engine which
    hooks all children (DeepSpeed) hooks no other point's.

    Attributes:
        inner: called in place of ``whole``, in a pass of several points.
    """

    def __init__(self, whole: nn.Module, number: int, shares: RowShares) -> None:
        super().__init__()
        vars(self)["whole"], vars(self)["inner"] = whole, None
        self._number, self._shares = number, shares
        joined = [module for module in whole.modules() if isinstance(module, JoinedLayer)]
        own = [m.points[str(number)] for m in joined if str(number) in m.points]
        self.own_layers = nn.ModuleList(own)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute ``whole`` with this point's adapter on all rows."""
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        with self._shares.give_all(self._number):
            return self.whole(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of ``whole``."""
        self.training = mode
        self.whole.train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        """Attributes of the model, such as ``config``, are those of ``whole``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["whole"], name)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yield those of ``whole``, under their names there."""
        yield from self.whole.named_modules(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the point's own parameters, under the names of an ordinary run."""
        for name, parameter in self.whole.named_parameters(*args, **kwargs):
            alone = get_alone_name(name, self._number)
            if alone is not None:
                yield alone, parameter
            elif self._number == 0 and not parameter.requires_grad:
                yield name, parameter

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return the parameter that has the name ``target`` in an ordinary run."""
        owner, _, own = target.rpartition(".")
        joined = f"{owner}{get_joined_prefix(self._number)}{own}"
        return self.whole.get_parameter(joined)


@contextmanager
def call_points_together(
    whole: nn.Module, calls: Sequence[tuple[nn.Module, nn.Module]]
) -> Iterator[nn.Module]:
    """Yield the module to call for a pass of several points.

    An engine's wrappers of several points are called one inside another, so that each sees the pass
    begin and end: ``wrapper_0(point_0(wrapper_1(point_1(... whole))))``.

    Args:
        whole: with all adapters.
        calls: a point's model, a ``PointModel``, and the engine's wrapper of it or itself.
    """
    inner = whole
    wrapped = [(point, call) for point, call in calls if call is not point]
    for point, call in reversed(wrapped):
        vars(point)["inner"], inner = inner, call
    try:
        yield inner
    finally:
        for point, _ in wrapped:
            vars(point)["inner"] = None


def make_point_model(
    whole: LoadedModel, setup: ModelSetup, number: int, shares: RowShares
) -> LoadedModel:
    """Return the loaded model of point ``number``.

    Args:
        whole: with all adapters.
        setup: of the point: its configuration and adapter.
        shares: of the model's layers.
    """
    model = cast(Any, PointModel(whole.model, number, shares))
    alone = (get_alone_name(name, number) for name in whole.adapter_names)
    return replace(
        whole,
        setup=replace(setup, skeleton=replace(setup.skeleton, model=model)),
        engine=whole.engine.split_optimizer(),
        trained=sum(p.numel() for p in trainable_parameters(model).values()),
        adapter_names=tuple(name for name in alone if name is not None),
    )
