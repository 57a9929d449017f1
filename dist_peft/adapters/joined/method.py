"""All adapters of a sweep, attached as one."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from dist_peft.adapters.joined.attach import HasLayers, attach_joined
from dist_peft.adapters.joined.row_shares import RowShares
from dist_peft.adapters.protocol import AdapterDefaults, PublicAdapter

__all__ = ["JoinedAdapter"]


class JoinedAdapter(AdapterDefaults):
    """The adapters of several runs on one model. See ``Adapter``.

    Each of ``adapters`` is trained and saved by the rest of the program; this one attaches them.

    Attributes:
        adapters: by number.
        shares: which sequences of a batch belong to which.
    """

    def __init__(self, adapters: Sequence[HasLayers]) -> None:
        self.adapters, self.shares = list(adapters), RowShares()

    def attach_to_model(self, model: nn.Module) -> None:
        attach_joined(model, self.adapters, self.shares)

    def begin_micro_batch(self, step: int, sample_ids: Tensor) -> None:
        """Give each adapter as many of the sequences; their number is a multiple of adapters."""
        parts = sample_ids.chunk(len(self.adapters))
        for adapter, own in zip(self.adapters, parts, strict=True):
            adapter.begin_micro_batch(step, own)
        self.shares.split_batch([(number, len(own)) for number, own in enumerate(parts)])

    def list_init_factors(self) -> tuple[str, ...]:
        return self.adapters[0].list_init_factors()

    def set_init_factors(self, tensors: Mapping[str, Tensor]) -> None:
        for adapter in self.adapters:
            adapter.set_init_factors(tensors)

    def to_public_adapter(self, tensors: Mapping[str, Tensor], base: str) -> PublicAdapter:
        raise RuntimeError("each adapter of a sweep is saved by itself")
