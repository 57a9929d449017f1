"""The format of a method whose adapters are changes that do not depend on the weight.

A method parses its tensors into a ``WeightDelta`` for each module; checking and merging follow.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from dist_peft.adapters.low_rank.delta_merger import DeltaMerger, WeightDelta
from dist_peft.adapters.peft_tensors import describe_rank_config
from dist_peft.adapters.protocol import PeftFormat, PublicAdapter

__all__ = ["DeltaFormat"]


class DeltaFormat(PeftFormat, ABC):
    """PEFT's files of such a method.

    Attributes:
        method_name: for messages.
    """

    method_name: str

    @abstractmethod
    def parse_deltas(self, public: PublicAdapter) -> Mapping[str, WeightDelta]:
        """Return module path -> its change, with every shape checked.

        Raises:
            UserError: a tensor is empty, absent, of another method or shape.
        """

    def check(self, public: PublicAdapter) -> None:
        """Compare every tensor with the configuration.

        Raises:
            UserError: see ``parse_deltas``.
        """
        self.parse_deltas(public)

    def describe(self, config: Mapping[str, Any]) -> str:
        """Return type, rank and alpha."""
        return describe_rank_config(config)

    def open_merger(self, public: PublicAdapter, *, tied: bool) -> DeltaMerger:
        """Return the merger.

        Raises:
            UserError: see ``parse_deltas``.
        """
        return DeltaMerger(self.method_name, self.parse_deltas(public))
