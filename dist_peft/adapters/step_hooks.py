"""Hooks of a method around an optimizer step: it may look at gradients and change parameters.

Most methods do neither (``NoStepHooks``). AdaLoRA keeps an importance of every element of its
parameters and sets some parameters to zero, at steps that depend on the length of the run. LoRA
through the quantizer encodes the base's rows again after each update, and after a load.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dist_peft.model.adapter_module import RowUpdate

__all__ = ["ImportanceRule", "NoStepHooks", "ParameterAccess", "StepHooks"]


@dataclass(frozen=True)
class ImportanceRule:
    """Running importances of all elements of the trainable parameters.

    Zhang et al. 2023, equations 8 to 10::

        I_t = |w g|                                       after the update, with its gradient
        sensitivity_t = beta1 sensitivity_(t-1) + (1 - beta1) I_t
        uncertainty_t = beta2 uncertainty_(t-1) + (1 - beta2) |I_t - sensitivity_t|

    They are sharded, saved and resumed as Adam's moments are.

    Attributes:
        beta1, beta2: of the two means.
        is_active: returns whether the step that is being made is counted.
    """

    beta1: float
    beta2: float
    is_active: Callable[[], bool]


class ParameterAccess(Protocol):
    """Whole parameters between two steps; all ranks call it in the same order."""

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        ...

    def gather_moment(self, name: str, key: str) -> Tensor:
        """Return the whole ``sensitivity`` or ``uncertainty`` of a parameter, on the CPU."""
        ...

    def gather_parameter(self, name: str) -> Tensor:
        """Return the whole parameter, on the CPU."""
        ...

    def gather_matching_rows(self, name: str, like: Tensor) -> Tensor:
        """Return those rows of a parameter that this rank keeps of ``like``, a frozen parameter
        with as many, on the CPU; without communication where it has them already."""
        ...

    def overwrite_parameter(self, name: str, value: Tensor) -> None:
        """Replace the values of a parameter on every rank."""
        ...

    def overwrite_local_rows(self, updates: Iterable[RowUpdate]) -> None:
        """Replace this rank's rows of frozen parameters, one after the other; they are computed as
        they are asked for, when no parameter is gathered."""
        ...


class StepHooks(Protocol):
    """Hooks of an ``Adapter`` around optimizer steps."""

    def prepare_phase(self, done: int, total_steps: int) -> int:
        """Prepare the layers, on meta, for the steps after ``done`` ones.

        Returns:
            After how many steps they need another preparation, for which the run saves a
            checkpoint and loads the base again; ``total_steps``: never.
        """
        ...

    def plan_steps(self, total_steps: int) -> None:
        """Learn the length of the run, before its first step.

        Raises:
            UserError: the method's schedule does not fit into it.
        """
        ...

    def get_importance_rule(self) -> ImportanceRule | None:
        """Return how importances are kept; None: they are not."""
        ...

    def finish_step(self, done: int, access: ParameterAccess) -> None:
        """Act after the update that made it ``done`` steps; called on every rank."""
        ...

    def finish_load(self, access: ParameterAccess) -> None:
        """Act after other values of the parameters were loaded; called on every rank."""
        ...


class NoStepHooks:
    """Hooks of methods that are parameters and a forward pass."""

    def prepare_phase(self, done: int, total_steps: int) -> int:
        return total_steps

    def plan_steps(self, total_steps: int) -> None:
        pass

    def get_importance_rule(self) -> ImportanceRule | None:
        return None

    def finish_step(self, done: int, access: ParameterAccess) -> None:
        pass

    def finish_load(self, access: ParameterAccess) -> None:
        pass
