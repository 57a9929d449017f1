"""Options of ``adapter.through_quantizer``, which the section of LoRA has among its own."""

from typing import Literal, Self

from pydantic import Field, model_validator

from dist_peft.core.config.types import ConfigSection, Float

__all__ = ["ThroughConfig", "ThroughStart"]

ThroughStart = Literal["auto", "none", "8bit", "lora"]


class ThroughConfig(ConfigSection):
    """How merged weights are trained in the base's own low-bit format."""

    through_quantizer: bool = Field(
        False,
        description="Train the merged weights in the base's own low-bit format: the forward pass "
        "multiplies with quantize(W + s B A), so that the merged model is the trained one, and the "
        "adapter alone is not. Needs a quantized base.",
    )
    through_start: ThroughStart = Field(
        "auto",
        description="through_quantizer: the form of the first steps. 8bit: W + s B A in 8 bits, "
        "for bases of 2 and 3; these steps take the memory of an 8-bit base. lora: base "
        "and product of the adapter apart. none: the base's format from the first step on. auto: "
        "lora where the base comes quantized, else none.",
    )
    through_start_share: Float = Field(
        0.3, gt=0, lt=1, description="Share of the steps that through_start is for."
    )

    through_zeros: bool = Field(
        False,
        description="through_quantizer, base.quant.kind int: a second pair of rank r, QA-LoRA's, "
        "moves the zeros of the groups, which are fractions then. For 2 and 3 bits, and formats "
        "with float zeros: mlx, hf-metal, gguf.",
    )

    @model_validator(mode="after")
    def _check_start_is_used(self) -> Self:
        if self.through_start in ("8bit", "lora") and not self.through_quantizer:
            raise ValueError(
                f"through_start: {self.through_start} is for through_quantizer: true; set it, or "
                "leave out through_start"
            )
        if self.through_zeros and not self.through_quantizer:
            raise ValueError(
                "through_zeros is for through_quantizer: true; set it, or leave out through_zeros"
            )
        if self.through_zeros and self.through_start == "lora":
            raise ValueError(
                "through_zeros moves zeros that are encoded in each step, and with through_start: "
                "lora the first steps encode nothing; use none or 8bit"
            )
        return self
