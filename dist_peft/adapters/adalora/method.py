"""The adapter method ``adalora``: LoRA whose ranks are chosen while it trains.

``adapters.adalora.layer`` has the layer, ``adapters.adalora.budget`` the schedule. Importances are
kept element by element where the parameter's shard is (``adapters.step_hooks``). At a step that
masks, each rank gathers those of one parameter after another and computes the same scores from
whole tensors: masks depend neither on the number of ranks nor on how parameters are sharded. Which
triplets are kept in the final phase follows from the importances, which do not change in it, so
that a resumed run needs no other state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dist_peft.adapters.adalora.budget import (
    BudgetSchedule,
    choose_kept_triplets,
    score_triplets,
)
from dist_peft.adapters.adalora.format import build_public_adalora
from dist_peft.adapters.adalora.layer import RANK_EPSILON, AdaLoraLinear, OrthogonalityPenalty
from dist_peft.adapters.low_rank.method import LinearsAdapter
from dist_peft.adapters.low_rank.module import LowRankSpec
from dist_peft.adapters.peft_tensors import mark_transposed
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.adapters.step_hooks import ImportanceRule, ParameterAccess
from dist_peft.core.config.run import AdaLoraConfig
from dist_peft.core.errors import UserError

__all__ = ["AdaLoraAdapter"]

_NAMES = ("lora_A", "lora_E", "lora_B")


@dataclass
class _StepCounter:
    """The number of updates with the one that is being made."""

    done: int = 0


class AdaLoraAdapter(LinearsAdapter[AdaLoraConfig, AdaLoraLinear]):
    """AdaLoRA on linears."""

    takes_transposed = True

    def __init__(self, config: AdaLoraConfig, *, seed: int, arithmetic: torch.dtype) -> None:
        super().__init__(config, seed=seed, arithmetic=arithmetic)
        self.penalty = OrthogonalityPenalty()
        self.schedule: BudgetSchedule | None = None
        self._counter = _StepCounter()
        self._kept: dict[str, Tensor] | None = None

    # -- building ------------------------------------------------------------------------------

    def _prepare_targets(self, names: Sequence[str], model: nn.Module) -> None:
        self.penalty.weight = self.config.orth_reg_weight / (2 * len(names))

    def _build_layer(self, name: str, module: nn.Module) -> AdaLoraLinear:
        linear, r = self._require_linear(name, module), self.config.init_r
        most = min(linear.in_features, linear.out_features)
        if r > most:
            raise UserError(
                f"adapter.kind adalora needs adapter.init_r of at most {most} in {name} "
                f"[{linear.out_features}, {linear.in_features}], not {r}: more vectors cannot be "
                "orthogonal; lower adapter.init_r"
            )
        scaling = self.config.alpha / (r + RANK_EPSILON)
        spec = LowRankSpec(r, scaling, self.arithmetic, self.seed)
        return AdaLoraLinear(linear, name, spec, self._build_dropout(name), self.penalty)

    # -- training ------------------------------------------------------------------------------

    def plan_steps(self, total_steps: int) -> None:
        """Make the schedule.

        Raises:
            UserError: no step is left between ``tinit`` and ``tfinal``.
        """
        c = self.config
        if c.tinit >= total_steps - c.tfinal:
            raise UserError(
                f"adapter.tinit {c.tinit} and adapter.tfinal {c.tfinal} leave none of the "
                f"{total_steps} steps of the run to lower the ranks in; make them smaller, or "
                "train longer (train.steps, train.epochs)"
            )
        count = len(self.layers)
        self.schedule = BudgetSchedule(
            first=c.init_r * count,
            last=c.target_r * count,
            tinit=c.tinit,
            tfinal=c.tfinal,
            delta_t=c.delta_t,
            total_steps=total_steps,
        )

    def begin_micro_batch(self, step: int, sample_ids: Tensor) -> None:
        super().begin_micro_batch(step, sample_ids)
        self._counter.done = step + 1

    def add_penalty_gradient(self, loss: Tensor, parts: float) -> None:
        self.penalty.attach_to_loss(loss, parts)

    def get_importance_rule(self) -> ImportanceRule:
        return ImportanceRule(self.config.beta1, self.config.beta2, self._counts_importance)

    def _counts_importance(self) -> bool:
        return self.schedule is not None and self.schedule.counts_importance(self._counter.done)

    def finish_step(self, done: int, access: ParameterAccess) -> None:
        """Set the numbers ``E`` of unimportant triplets to zero, where the schedule says so."""
        assert self.schedule is not None, "plan_steps comes first"
        budget = self.schedule.get_budget(done)
        if budget is None:
            return
        is_final = done >= self.schedule.final_step
        kept = self._kept if is_final else None
        if kept is None:
            scores = [self._score_module(path, access) for path in self.layers]
            kept = dict(zip(self.layers, choose_kept_triplets(scores, budget), strict=True))
        self._kept = kept if is_final else None
        for path, own in kept.items():
            if not bool(own.all()):
                name = f"{path}.lora_E"
                access.overwrite_parameter(name, access.gather_parameter(name) * own)

    def _score_module(self, path: str, access: ParameterAccess) -> Tensor:
        sensitivity, uncertainty = (
            tuple(access.gather_moment(f"{path}.{name}", key).float() for name in _NAMES)
            for key in ("sensitivity", "uncertainty")
        )
        triple = tuple[Tensor, Tensor, Tensor]
        return score_triplets(cast(triple, sensitivity), cast(triple, uncertainty))

    # -- saving --------------------------------------------------------------------------------

    def to_public_adapter(self, tensors: Mapping[str, Tensor], base: str) -> PublicAdapter:
        """PEFT's form. See ``Adapter`` and ``adapters.adalora.format``."""
        total = 0 if self.schedule is None else self.schedule.total_steps
        modules = self._collect_gathered(tensors)
        public = build_public_adalora(
            self.config, modules, self._list_adapted_names(), base, total_steps=total
        )
        return mark_transposed(public, self.layers.values())
