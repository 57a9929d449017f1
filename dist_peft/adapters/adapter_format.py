"""The table of adapter formats: one ``protocol.AdapterFormat`` a method.

A directory has a configuration (JSON) and a safetensors file. ``adapters.directory`` reads and
writes both, opens the merger, and looks the method up here. A method adds a
class to its own ``format`` module and a row to ``ADAPTER_FORMATS``, nothing else.
"""

from collections.abc import Mapping
from typing import Any

from dist_peft.adapters.adalora.format import AdaLoraFormat
from dist_peft.adapters.bottleneck.format import BottleneckFormat
from dist_peft.adapters.fusion.format import FusionFormat
from dist_peft.adapters.ia3.format import Ia3Format
from dist_peft.adapters.loha.format import LohaFormat
from dist_peft.adapters.lokr.format import LokrFormat
from dist_peft.adapters.lora.format import LoraFormat
from dist_peft.adapters.protocol import AdapterFormat
from dist_peft.adapters.vera.format import VeraFormat
from dist_peft.adapters.virtual_tokens.format import VirtualTokensFormat

__all__ = ["ADAPTER_FORMATS", "PEFT_TYPES", "find_format"]


ADAPTER_FORMATS: tuple[AdapterFormat, ...] = (
    LoraFormat(),
    VeraFormat(),
    LohaFormat(),
    LokrFormat(),
    AdaLoraFormat(),
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
