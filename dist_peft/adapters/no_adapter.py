"""The adapter method ``none``: the bare base, for evaluation."""

from collections.abc import Mapping

from torch import Tensor, nn

from dist_peft.adapters.protocol import PlainAdapter, PublicAdapter

__all__ = ["NoAdapter"]


class NoAdapter(PlainAdapter):
    """Changes nothing. See ``adapters.base.Adapter``."""

    def attach(self, model: nn.Module) -> None:
        pass

    def begin(self, step: int, sample_ids: Tensor) -> None:
        pass

    def to_public(self, tensors: Mapping[str, Tensor], base: str) -> PublicAdapter:
        raise RuntimeError("adapter.kind none has nothing to save")
