"""The section ``base.quant``: how frozen weights are stored."""

from typing import Literal, Self

from pydantic import Field, model_validator

from dist_peft.core.config.types import ConfigSection, Count, Int

__all__ = ["QuantConfig"]

_BITS = {"nf4": 4, "mxfp4": 4, "fp8": 8, "nvfp4": 4, "fp4": 4, "llm_int8": 8}
_GROUP_SIZES = {"mxfp4": 32, "nvfp4": 16}
"""Of the kinds that have no choice."""

_OWN_DEFAULTS = {
    "mxfp4": {"group_size": 32},
    "fp8": {"bits": 8, "group_size": 128},
    "nvfp4": {"group_size": 16},
    "llm_int8": {"bits": 8},
}
"""Defaults of a kind that differ from those of the fields."""


class QuantConfig(ConfigSection):
    """How the frozen linear weights are stored. ``null`` keeps them in ``base.compute_dtype``."""

    kind: Literal["nf4", "int", "mxfp4", "fp8", "nvfp4", "fp4", "llm_int8"] = Field(
        "nf4",
        description="nf4: 4-bit NormalFloat (QLoRA). int: affine integers in groups. mxfp4: 4-bit "
        "floats (E2M1) with a power of two for each 32, as in gpt-oss. fp8: 8-bit floats (E4M3) "
        "with a scale for each group. nvfp4: 4-bit floats with an 8-bit float for each 16. "
        "fp4: bitsandbytes' 4-bit floats. llm_int8: bitsandbytes' 8 bits with a scale a row.",
    )
    bits: Literal[2, 3, 4, 8] = Field(
        4, description="Bits a weight; nf4, mxfp4 and nvfp4 have 4, fp8 has 8 (also its default)."
    )
    group_size: Int = Field(
        64,
        ge=8,
        le=2**16,
        description="Weights that share one scale, along in_features; mxfp4 has 32, "
        "nvfp4 16, and the default of fp8 is 128.",
    )
    double_quant: bool = Field(
        True, description="nf4 only: quantize the scales too, within each row."
    )
    embeddings: bool = Field(
        False,
        description="Quantize the input embedding and the output head too, which stay frozen; tied "
        "ones share one packed copy. Logits then carry the error of a quantized head: compare "
        "held-out losses.",
    )
    solver: Literal["rtn", "hqq", "gptq", "absmax"] = Field(
        "rtn",
        description="int only: how codes are chosen. rtn: round to nearest. hqq: float zeros of "
        "least error, without calibration. gptq: least error of each layer's output on text from "
        "data.train. absmax: round to nearest in groups that are symmetric around 0, as in GGUF.",
    )
    calibration_samples: Count = Field(
        128, description="gptq only: calibration sequences for the Hessians."
    )
    calibration_tokens: Int = Field(
        2048, ge=8, description="gptq only: tokens of a sequence, at most the base's positions."
    )

    @property
    def has_nested_scales(self) -> bool:
        """Whether the scales are quantized too."""
        return self.kind == "nf4" and self.double_quant

    @model_validator(mode="after")
    def _check_quant_options(self) -> Self:
        for key, value in _OWN_DEFAULTS.get(self.kind, {}).items():
            if key not in self.model_fields_set:
                self.__dict__[key] = value
        bits = _BITS.get(self.kind, self.bits)
        if self.bits != bits:
            raise ValueError(
                f"{self.kind} has {bits} bits, not {self.bits}; use kind: int for other widths"
            )
        group_size = _GROUP_SIZES.get(self.kind, self.group_size)
        if self.group_size != group_size:
            raise ValueError(f"{self.kind} has groups of {group_size}, not {self.group_size}")
        if self.kind != "int" and self.solver != "rtn":
            raise ValueError(
                f"{self.kind} rounds to nearest; solver {self.solver} is for kind: int"
            )
        if self.embeddings and self.solver == "gptq":
            raise ValueError(
                "embeddings: true quantizes while a base is loaded, and solver gptq writes one in "
                "advance, in which embeddings are not quantized; leave it out, or use solver hqq"
            )
        if self.group_size % 8:
            raise ValueError(f"group_size {self.group_size} is not a multiple of 8")
        return self
