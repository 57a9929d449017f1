"""Shared by the methods that add a change to linears: match targets, wrap them, gather the trained
parameters."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from dist_peft.adapters.low_rank.module import LowRankModule
from dist_peft.adapters.protocol import AdapterDefaults, PublicAdapter, collect_gathered_parameters
from dist_peft.adapters.targets import (
    check_pattern_keys,
    list_adapter_targets,
    resolve_pattern_value,
)
from dist_peft.core.config.run import LinearsConfig, LowRankConfig
from dist_peft.core.errors import UserError
from dist_peft.model.experts import ExpertStack
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout

__all__ = ["LinearsAdapter", "LowRankAdapter"]

Config = TypeVar("Config", bound=LinearsConfig)
RankConfig = TypeVar("RankConfig", bound=LowRankConfig)
Layer = TypeVar("Layer", bound=LowRankModule)


class LinearsAdapter(AdapterDefaults, ABC, Generic[Config, Layer]):
    """Targets, dropout position and gathered parameters.

    Attributes:
        layers: the wrappers by path, once attached.
        position: step and samples that seed the dropout masks.
    """

    takes_transposed: ClassVar[bool] = False
    """Whether PEFT applies the method to weights that are stored transposed (``Conv1D``)."""

    def __init__(self, config: Config, *, seed: int, arithmetic: torch.dtype) -> None:
        self.config, self.seed, self.arithmetic = config, seed, arithmetic
        self.position = DropoutPosition(seed)
        self.layers: dict[str, Layer] = {}
        self._all_names: list[str] = []

    # -- building ------------------------------------------------------------------------------

    def attach_to_model(self, model: nn.Module) -> None:
        """Wrap the targets. See ``Adapter``.

        Raises:
            UserError: targets or patterns match nothing, or settings that exclude each other.
        """
        names = self._list_target_names(model)
        self._prepare_targets(names, model)
        # of the modules that transformers has, too
        modules = list(model.named_modules())
        self._all_names = [name for name, m in modules if not isinstance(m, ExpertStack)]
        self.layers = {name: self._build_layer(name, model.get_submodule(name)) for name in names}
        for name, layer in self.layers.items():
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, layer)

    def _list_target_names(self, model: nn.Module) -> list[str]:
        return list_adapter_targets(self.config.target_modules, model)

    @abstractmethod
    def _prepare_targets(self, names: Sequence[str], model: nn.Module) -> None:
        """Check settings against all targets before the first is wrapped."""

    @abstractmethod
    def _build_layer(self, name: str, module: nn.Module) -> Layer:
        """The wrapper of one target."""

    def _require_linear(self, name: str, module: nn.Module) -> FrozenLinear:
        """Return ``module``, which is no experts of a mixture."""
        if isinstance(module, ExpertStack):
            raise UserError(
                f"adapter.kind {self.config.kind} is not for experts such as {name}; list "
                "adapter.target_modules without experts, such as [q_proj, k_proj, v_proj, o_proj], "
                "or use adapter.kind lora"
            )
        assert isinstance(module, FrozenLinear)
        if module.is_transposed and not self.takes_transposed:
            raise UserError(
                f"adapter.kind {self.config.kind} is not for weights stored transposed (Conv1D) "
                f"such as {name}; use adapter.kind lora"
            )
        return module

    def _build_dropout(self, name: str) -> SampleDropout:
        return SampleDropout(self.config.dropout, name, self.position)

    # -- training ------------------------------------------------------------------------------

    def begin_micro_batch(self, step: int, sample_ids: Tensor) -> None:
        self.position.begin_micro_batch(step, sample_ids)

    # -- saving --------------------------------------------------------------------------------

    @abstractmethod
    def to_public_adapter(self, tensors: Mapping[str, Tensor], base: str) -> PublicAdapter:
        """Return the public form of the gathered factors."""

    def _collect_gathered(
        self, tensors: Mapping[str, Tensor], leave_out: tuple[str, ...] = ()
    ) -> dict[str, dict[str, Tensor]]:
        """Path -> own name -> gathered parameter.

        Raises:
            RuntimeError: a tensor is absent, empty or has the wrong shape.
        """
        shapes = {
            path: {name: shape for name, shape in layer.shapes.items() if name not in leave_out}
            for path, layer in self.layers.items()
        }
        return collect_gathered_parameters(tensors, shapes)

    def _list_adapted_names(self, leave_out: Collection[str] = ()) -> list[str]:
        """The shortest list that means the same modules: last components, else whole names."""
        layers = set(self.layers) - set(leave_out)
        last = sorted({name.rpartition(".")[2] for name in layers})
        meant = [name for name in self._all_names if name.rpartition(".")[2] in last]
        return last if set(meant) == layers else sorted(layers)


class LowRankAdapter(LinearsAdapter[RankConfig, Layer]):
    """Methods with a rank and an alpha for each target."""

    def _prepare_targets(self, names: Sequence[str], model: nn.Module) -> None:
        check_pattern_keys("rank_pattern", self.config.rank_pattern, names)
        check_pattern_keys("alpha_pattern", self.config.alpha_pattern, names)

    def _resolve_rank_and_alpha(self, name: str) -> tuple[int, float]:
        config = self.config
        return (
            resolve_pattern_value(config.rank_pattern, name, config.r),
            resolve_pattern_value(config.alpha_pattern, name, config.alpha),
        )
