"""An adapter around another method, which it passes everything on to."""

from collections.abc import Mapping

from torch import Tensor

from dist_peft.adapters.protocol import Adapter, ExportLimits
from dist_peft.adapters.step_hooks import ImportanceRule, ParameterAccess

__all__ = ["AroundMethod"]


class AroundMethod:
    """The members of ``Adapter`` but for attaching and the public form.

    Attributes:
        trunk: the method inside.
    """

    trunk: Adapter

    @property
    def num_extra_positions(self) -> int:
        return self.trunk.num_extra_positions

    def begin_micro_batch(self, step: int, sample_ids: Tensor) -> None:
        self.trunk.begin_micro_batch(step, sample_ids)

    def add_penalty_gradient(self, loss: Tensor, parts: float) -> None:
        self.trunk.add_penalty_gradient(loss, parts)

    def prepare_phase(self, done: int, total_steps: int) -> int:
        return self.trunk.prepare_phase(done, total_steps)

    def plan_steps(self, total_steps: int) -> None:
        self.trunk.plan_steps(total_steps)

    def get_importance_rule(self) -> ImportanceRule | None:
        return self.trunk.get_importance_rule()

    def finish_step(self, done: int, access: ParameterAccess) -> None:
        self.trunk.finish_step(done, access)

    def finish_load(self, access: ParameterAccess) -> None:
        self.trunk.finish_load(access)

    def list_init_factors(self) -> tuple[str, ...]:
        return self.trunk.list_init_factors()

    def set_init_factors(self, tensors: Mapping[str, Tensor]) -> None:
        self.trunk.set_init_factors(tensors)

    def input_fingerprint(self) -> str:
        return self.trunk.input_fingerprint()

    def get_export_limits(self, tied: bool) -> ExportLimits:
        return self.trunk.get_export_limits(tied)
