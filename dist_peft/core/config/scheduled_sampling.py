"""Configuration of scheduled sampling: when gold inputs give way to the model's own predictions."""

from typing import Literal, Self

from pydantic import Field, model_validator

from dist_peft.core.config.data import DataConfig
from dist_peft.core.config.types import ConfigSection, Float

__all__ = ["ScheduledSamplingConfig", "check_sampled_data"]


class ScheduledSamplingConfig(ConfigSection):
    """Train on the model's own predictions as inputs (Bengio et al. 2015), in two passes
    (Mihaylova and Martins 2019). At step i, from 0, an input token of the completion stays the gold
    one with probability eps."""

    schedule: Literal["linear", "exponential", "inverse_sigmoid"] = Field(
        "linear",
        description="linear: eps = k - c i. exponential: eps = k^i. inverse_sigmoid: "
        "eps = k / (k + exp(i / k)). Never below eps_min.",
    )
    k: Float | None = Field(
        None,
        description="linear: in [0, 1], default 1. exponential: in (0, 1). inverse_sigmoid: from 1 "
        "on; eps is 0.5 at step k ln(k).",
    )
    c: Float | None = Field(None, ge=0, description="linear: by how much eps falls in a step.")
    eps_min: Float = Field(0.0, ge=0, le=1, description="Least eps.")
    temperature: Float = Field(
        0.0,
        ge=0,
        le=1000,
        description="0: an input is replaced by the most probable token (argmax). Above: by one "
        "drawn from softmax(logits / temperature).",
    )

    @property
    def resolved_k(self) -> float:
        """``k``, or its default."""
        return 1.0 if self.k is None else self.k

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        kind, k = self.schedule, self.k
        if kind != "linear" and self.c is not None:
            raise ValueError(f"c is the slope of schedule: linear, not of {kind}; leave it out")
        if kind == "linear":
            if self.c is None:
                raise ValueError("schedule: linear needs c, such as 0.001: eps is 0.5 at step 500")
            if not 0 <= self.resolved_k <= 1:
                raise ValueError(f"schedule: linear starts at a probability k in [0, 1], not {k:g}")
        elif k is None:
            example = "0.999" if kind == "exponential" else "100"
            raise ValueError(f"schedule: {kind} needs k, such as {example}")
        elif kind == "exponential" and not 0 < k < 1:
            raise ValueError(f"schedule: exponential falls with k in (0, 1), not {k:g}")
        elif kind == "inverse_sigmoid" and k < 1:
            raise ValueError(f"schedule: inverse_sigmoid needs k of at least 1, not {k:g}")
        return self


def check_sampled_data(data: DataConfig) -> None:
    """Check that records have completions whose tokens are inputs.

    Raises:
        ValueError: they have classes, or prompts would be replaced too.
    """
    key = "train.scheduled_sampling replaces inputs by predicted tokens"
    if data.is_classification:
        raise ValueError(
            f"{key}, and base.head classifier predicts a class of a whole text; leave it out"
        )
    if data.loss_on == "all":
        raise ValueError(
            f"{key}, and data.loss_on: all would replace prompts too; use loss_on: completion (the "
            "tokens of format: text are all in the loss anyway)"
        )
