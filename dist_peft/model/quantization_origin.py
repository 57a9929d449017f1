"""Origin of a base that ``dist-peft quantize`` wrote, or that has GPTQ's factors."""

from pathlib import Path
from typing import Any

from dist_peft.model.gptq_factors import read_factor_origin
from dist_peft.model.hub import read_json_object
from dist_peft.model.prequantized.base import OWN_METHOD

__all__ = ["read_quantization_origin"]


def read_quantization_origin(directory: Path) -> dict[str, Any]:
    """Return the recorded origin of a ``dist-peft quantize`` directory, or of a base with factors
    (``model.gptq_factors``); empty for any other."""
    if not (directory / "config.json").is_file():
        return {}
    found = read_json_object(directory / "config.json").get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != OWN_METHOD:
        return read_factor_origin(directory)
    origin = found.get("made_from")
    return origin if isinstance(origin, dict) else {}
