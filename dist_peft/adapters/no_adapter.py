"""The adapter method ``none``: the bare base, for evaluation."""

from collections.abc import Mapping

from torch import Tensor, nn

from dist_peft.adapters.protocol import AdapterDefaults, PublicAdapter

__all__ = ["NoAdapter"]


class NoAdapter(AdapterDefaults):
    """Changes nothing. See ``adapters.protocol.Adapter``."""

    def attach_to_model(self, model: nn.Module) -> None:
        pass

    def begin_micro_batch(self, step: int, sample_ids: Tensor) -> None:
        pass

    def to_public_adapter(self, tensors: Mapping[str, Tensor], base: str) -> PublicAdapter:
        raise RuntimeError("adapter.kind none has nothing to save")
