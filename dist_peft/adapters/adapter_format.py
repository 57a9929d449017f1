"""The formats of adapters on disk: one class a method, one table.

A directory has a configuration (JSON) and a safetensors file. ``adapters.directory`` reads and
writes both and looks the method up here; ``adapters.mergers`` opens the merger. A method adds a
class to its own ``format`` module and a row to ``ADAPTER_FORMATS``, nothing else.
"""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from torch import Tensor

from dist_peft.adapters.bottleneck.format import BottleneckFormat
from dist_peft.adapters.fusion.format import FusionFormat
from dist_peft.adapters.ia3.format import Ia3Format
from dist_peft.adapters.lora.format import LoraFormat
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.adapters.virtual_tokens.format import VirtualTokensFormat
from dist_peft.core.span import Span
from dist_peft.quant.affine import AffineParts

__all__ = ["ADAPTER_FORMATS", "PEFT_TYPES", "AdapterFormat", "WeightMerger", "find_format"]


class WeightMerger(Protocol):
    """Merges one adapter into rows of the base, by weight name ``PATH.weight``.

    Row-local: a base of any size is merged in chunks, in any order, each row once.
    """

    def changes_weight(self, weight: str) -> bool:
        """Return whether the adapter changes this weight."""
        ...

    def check_weight_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Compare the adapter with the base's shapes before a row is merged.

        Args:
            shapes: weight name -> rows and columns in the base.

        Raises:
            UserError: the base has no such weight, or of another shape.
        """
        ...

    def merge_weight_rows(
        self, weight: str, rows: Tensor, span: Span, in_base: Literal["original", "decoded"]
    ) -> Tensor:
        """Return rows ``span`` of a weight with the adapter in them.

        Args:
            weight: a name that ``changes_weight``.
            rows: float32 ``[len(span), columns]``.
            span: rows of the weight.
            in_base: original: rows of the base's files. decoded: rows as training saw them.
        """
        ...

    def subtract_initial_delta(self, weight: str, rows: Tensor, span: Span) -> Tensor:
        """Return the rows that were quantized: without the initial product of PiSSA and LoftQ."""
        ...

    def merge_affine_parts(self, weight: str, parts: AffineParts, span: Span) -> AffineParts:
        """Return integer codes whose zeros hold the adapter (QA-LoRA)."""
        ...

    def compute_group_change(self, weight: str, parts: AffineParts, span: Span) -> Tensor:
        """Return the change of each group ``[len(span), groups]`` (QA-LoRA)."""
        ...

    def list_unused_tensors(self) -> list[str]:
        """Return weights of which not every row was merged."""
        ...


class AdapterFormat(Protocol):
    """How a method's adapters lie on disk, and how they merge."""

    @property
    def peft_types(self) -> tuple[str, ...]:
        """Values of ``peft_type`` in its configuration; none where the format is not PEFT's."""
        ...

    @property
    def config_file(self) -> str:
        """Name of the configuration."""
        ...

    @property
    def tensors_file(self) -> str:
        """Name of the safetensors file."""
        ...

    @property
    def pickle_file(self) -> str:
        """Name of the file that the library writes instead without ``safe_saving``."""
        ...

    @property
    def safe_saving(self) -> str:
        """Call of that library that writes ``choose_tensors_file``."""
        ...

    @property
    def joins_head(self) -> bool:
        """Whether a classifier's head is in ``choose_tensors_file``, as PEFT has it."""
        ...

    @property
    def on_gptq_linears(self) -> bool:
        """Whether the ecosystem's library applies the method to GPTQ linears."""
        ...

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Return whether these contents of a configuration are of this method."""
        ...

    def check(self, public: PublicAdapter) -> None:
        """Compare every tensor with the configuration.

        Raises:
            UserError: one is empty, absent, or of the wrong shape.
        """
        ...

    def describe(self, config: Mapping[str, Any]) -> str:
        """Return the method and its sizes in one line, for ``dist-peft inspect``."""
        ...

    def explain_no_peft_form(self, config: Mapping[str, Any]) -> str | None:
        """Return the reason why PEFT cannot load the adapter; None: it can."""
        ...

    def open_merger(self, public: PublicAdapter, *, tied: bool) -> WeightMerger:
        """Return the merger.

        Args:
            public: checked by ``check``.
            tied: the base's output head shares the input embedding's weight.

        Raises:
            UserError: no weight of the base can hold this adapter.
        """
        ...


ADAPTER_FORMATS: tuple[AdapterFormat, ...] = (
    LoraFormat(),
    Ia3Format(),
    VirtualTokensFormat(),
    FusionFormat(),
    BottleneckFormat(),
)
"""Asked in this order."""

PEFT_TYPES = tuple(name for known in ADAPTER_FORMATS for name in known.peft_types)
"""Values of ``peft_type`` that are read."""


def find_format(config: Mapping[str, Any]) -> AdapterFormat | None:
    """Return the format of these contents of a configuration; None: of no method trained here."""
    return next((known for known in ADAPTER_FORMATS if known.matches(config)), None)
