"""Importances of parameters as optimizer state, and access to parameters between steps.

A method's ``ImportanceRule`` needs each element's weight and gradient right after an update, which
only the optimizer has, shard by shard, in every engine. So the importances are two more moments of
the optimizer, updated by a hook that runs after its step, and sharded, saved and loaded with the
others.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_peft.adapters.step_hooks import ImportanceRule
from dist_peft.engine import Engine
from dist_peft.engine.engine_protocol import OptimizerFactory
from dist_peft.model.adapter_module import RowUpdate

__all__ = ["EngineParameters", "ImportanceFactory"]

_NAMES = ("sensitivity", "uncertainty")


class ImportanceFactory:
    """Adds importances to the optimizers of another factory.

    Args:
        factory: of the optimizer.
        rule: how importances are kept.
    """

    def __init__(self, factory: OptimizerFactory, rule: ImportanceRule) -> None:
        self._factory, self._rule = factory, rule
        self.wants_plain = factory.wants_plain
        self.moment_names = (*factory.moment_names, *_NAMES)

    def build_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return the optimizer with importances of zero."""
        optimizer = self._factory.build_optimizer(groups)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.numel():
                    optimizer.state[parameter] |= {
                        n: torch.zeros_like(parameter, requires_grad=False) for n in _NAMES
                    }
        optimizer.register_step_post_hook(self._update_importances)
        return optimizer

    @torch.no_grad()
    def _update_importances(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if not self._rule.is_active():
            return
        beta1, beta2 = self._rule.beta1, self._rule.beta2
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or not parameter.numel():
                    continue
                state = optimizer.state[parameter]
                importance = (parameter * parameter.grad).abs()
                sensitivity, uncertainty = (state[name] for name in _NAMES)
                sensitivity.copy_(beta1 * sensitivity + (1 - beta1) * importance)
                change = (importance - sensitivity).abs()
                uncertainty.copy_(beta2 * uncertainty + (1 - beta2) * change)

    def read_moments(
        self, optimizer: torch.optim.Optimizer, parameter: Tensor
    ) -> dict[str, Tensor]:
        """Return all moments in float32, shaped like ``parameter``."""
        state = optimizer.state[parameter]
        own = {name: state.get(name, torch.zeros_like(parameter)).detach() for name in _NAMES}
        return {**self._factory.read_moments(optimizer, parameter), **own}

    def write_moments(
        self, optimizer: torch.optim.Optimizer, parameter: Tensor, moments: Mapping[str, Tensor]
    ) -> None:
        """Set all moments."""
        others = {name: value for name, value in moments.items() if name not in _NAMES}
        self._factory.write_moments(optimizer, parameter, others)
        for name in _NAMES:
            if parameter.numel() and optimizer.state[parameter][name] is not moments[name]:
                optimizer.state[parameter][name].copy_(moments[name])

    def set_num_steps(
        self, optimizer: torch.optim.Optimizer, step: int, skipped: Collection[int] = ()
    ) -> None:
        """Tell the wrapped factory's optimizer its number of updates."""
        self._factory.set_num_steps(optimizer, step, skipped)


class EngineParameters:
    """The ``ParameterAccess`` of a model in an engine."""

    def __init__(self, model: nn.Module, engine: Engine) -> None:
        self._model, self._engine = model, engine

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return self._engine.device

    def gather_moment(self, name: str, key: str) -> Tensor:
        """Return a whole moment of the parameter with this full name. Collective."""
        return self._engine.gather_moment(name, key)

    def gather_parameter(self, name: str) -> Tensor:
        """Return the whole parameter with this full name. Collective."""
        return self._engine.gather_parameter(self._model.get_parameter(name))

    def gather_matching_rows(self, name: str, like: Tensor) -> Tensor:
        """Return those rows of the parameter that this rank keeps of ``like``. Collective."""
        return self._engine.gather_matching_rows(self._model.get_parameter(name), like)

    def overwrite_parameter(self, name: str, value: Tensor) -> None:
        """Set the whole parameter with this full name on every rank."""
        self._engine.overwrite_parameter(name, value)

    def overwrite_local_rows(self, updates: Iterable[RowUpdate]) -> None:
        """Replace this rank's rows of frozen parameters."""
        self._engine.overwrite_local_rows(updates)
