"""Origin of a base that ``dist-peft quantize`` wrote, from its ``config.json``."""

from pathlib import Path
from typing import Any

from dist_peft.model.hub import read_json_object
from dist_peft.model.prequantized.base import OWN_METHOD

__all__ = ["read_quantization_origin"]


def read_quantization_origin(directory: Path) -> dict[str, Any]:
    """Return the recorded origin of a ``dist-peft quantize`` directory; empty for any other."""
    if not (directory / "config.json").is_file():
        return {}
    found = read_json_object(directory / "config.json").get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != OWN_METHOD:
        return {}
    origin = found.get("made_from")
    return origin if isinstance(origin, dict) else {}
