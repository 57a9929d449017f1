"""The adapter method ``none``: the bare base, for evaluation."""

from collections.abc import Mapping

from torch import Tensor, nn

from dist_peft.adapters.base import PublicAdapter

__all__ = ["NoAdapter"]


class NoAdapter:
    """Changes nothing. See ``adapters.base.Adapter``."""

    @property
    def extra_positions(self) -> int:
        return 0

    def attach(self, model: nn.Module) -> None:
        pass

    def begin(self, step: int, sample_ids: Tensor) -> None:
        pass

    def lr_scale(self, name: str) -> float:
        return 1.0

    def start_state(self) -> tuple[str, ...]:
        return ()

    def start_from(self, tensors: Mapping[str, Tensor]) -> None:
        pass

    def to_public(self, tensors: Mapping[str, Tensor], base: str) -> PublicAdapter:
        raise RuntimeError("adapter.kind none has nothing to save")
