"""A base with GPTQ's factors: the unquantized base, and how each of its linears is encoded.

Training through the quantizer with ``base.quant.solver: gptq`` encodes rows again after each step.
It needs the base's own rows and, for each input of linears, the factor of GPTQ (``quant.gptq``)::

    config.json, model*.safetensors, ...   the unquantized base
    gptq_factors/about.json                {"bits": 4, "group_size": 64, "made_from": {...},
                                            "files": {"model.layers.0...weight": "0.safetensors"}}
    gptq_factors/0.safetensors, ...        order, upper; linears of one input share a file
"""

from pathlib import Path
from typing import Any

from torch import nn

from dist_peft.core.config.quantization import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.hub import read_json_object
from dist_peft.quant.calibrated_codec import CalibratedCodec, StoredFactor

__all__ = ["ABOUT_FILE", "FACTORS", "has_gptq_factors", "read_factor_origin", "use_gptq_factors"]

FACTORS = "gptq_factors"
"""Directory of the factors in that of the base."""

ABOUT_FILE = "about.json"


def has_gptq_factors(directory: Path) -> bool:
    """Return whether a base has factors."""
    return (directory / FACTORS / ABOUT_FILE).is_file()


def read_factor_origin(directory: Path) -> dict[str, Any]:
    """Return ``made_from`` of a base with factors; empty for any other."""
    if not has_gptq_factors(directory):
        return {}
    origin = read_json_object(directory / FACTORS / ABOUT_FILE).get("made_from")
    return origin if isinstance(origin, dict) else {}


def use_gptq_factors(model: nn.Module, quant: QuantConfig | None, directory: Path) -> None:
    """Let each linear with a factor be encoded by GPTQ, if the base is to be encoded so.

    Args:
        model: on meta, its linears frozen.
        quant: ``base.quant``; with another solver factors are left alone.
        directory: of the base.

    Raises:
        UserError: the factors are for other groups or bits, or a linear has none.
    """
    if quant is None or quant.solver != "gptq" or not has_gptq_factors(directory):
        return
    about = read_json_object(directory / FACTORS / ABOUT_FILE)
    made = {key: about.get(key) for key in ("bits", "group_size")}
    if made != {"bits": quant.bits, "group_size": quant.group_size}:
        raise UserError(
            f"{directory / FACTORS} was made for {made['bits']} bits in groups of "
            f"{made['group_size']}, and base.quant has {quant.bits} in groups of "
            f"{quant.group_size}; remove {directory} to make it again, or change base.quant"
        )
    files = about.get("files")
    for module in model.modules():
        if not isinstance(module, FrozenLinear) or module.codec.affine_rows is None:
            continue
        name = files.get(module.source) if isinstance(files, dict) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(
                f"{directory / FACTORS / ABOUT_FILE} names no file for {module.source}; remove "
                f"{directory} to make it again"
            )
        padded = -(-module.in_features // quant.group_size) * quant.group_size
        module.codec = CalibratedCodec(
            quant.bits,
            quant.group_size,
            factor=StoredFactor(str(directory / FACTORS / name), padded),
        )
