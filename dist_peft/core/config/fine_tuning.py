"""Configuration of full and partial fine-tuning: weights of the base that are trained, and when."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dist_peft.core.config.types import ConfigSection, Int

__all__ = ["FullConfig", "Part", "PartialConfig", "SampleBlocksConfig", "UnfreezeConfig"]

BlockNumber = Annotated[Int, Field(ge=0)]
Part = Literal["all", "norms", "biases", "embeddings", "head"]


class UnfreezeConfig(ConfigSection):
    """Parameters that are trainable from a given step on."""

    step: Int = Field(ge=0, description="Optimizer steps completed before.")
    until: Int | None = Field(
        None, ge=1, description="Optimizer steps after which they are frozen again; default: never."
    )
    parts: list[Part] = Field(default_factory=list, description="See adapter.parts.")
    blocks: list[BlockNumber] = Field(default_factory=list, description="See adapter.blocks.")
    last_blocks: Int = Field(0, ge=0, description="See adapter.last_blocks.")

    @model_validator(mode="after")
    def _check_unfreeze_stage(self) -> Self:
        if not self.parts and not self.blocks and not self.last_blocks:
            raise ValueError("names nothing to train; give parts, blocks or last_blocks")
        if self.until is not None and self.until <= self.step:
            raise ValueError(f"until {self.until} is not after step {self.step}")
        return self


class SampleBlocksConfig(ConfigSection):
    """LISA (Pan et al. 2024): some decoder blocks at a time are trainable, drawn at random."""

    count: Int = Field(2, ge=1, description="Blocks trained at a time.")
    every: Int = Field(20, ge=1, description="Optimizer steps between draws.")


class FullConfig(ConfigSection):
    """Full fine-tuning: every parameter of the base is trainable and unquantized."""

    kind: Literal["full"] = "full"

    @property
    def unfreeze_stages(self) -> list[UnfreezeConfig]:
        """One stage from step 0 with all parameters, in the form of ``PartialConfig``."""
        return [UnfreezeConfig(step=0, parts=["all"])]


class PartialConfig(ConfigSection):
    """Partial fine-tuning: some parameters of the base are trainable, the rest is frozen and
    quantized."""

    kind: Literal["partial"] = "partial"
    parts: list[Part] = Field(
        default_factory=list,
        description="norms; biases (BitFit); embeddings: of tokens, and learned "
        "position embeddings; head: the output head (tied to the embedding: the same parameter); "
        "all.",
    )
    last_blocks: Int = Field(
        0, ge=0, description="Decoder blocks trained as a whole, counted from the last."
    )
    blocks: list[BlockNumber] = Field(
        default_factory=list,
        description="Decoder blocks trained as a whole, by number, from 0.",
    )
    unfreeze: list[UnfreezeConfig] = Field(
        default_factory=list,
        description="Parameters trained in some steps only, besides parts, blocks and last_blocks: "
        "a list of {step, until, parts, blocks, last_blocks}. In other steps they are not updated.",
    )
    sample_blocks: SampleBlocksConfig | None = Field(
        None,
        description="LISA: train randomly drawn decoder blocks, besides parts: {count, every}.",
    )

    @property
    def unfreeze_stages(self) -> list[UnfreezeConfig]:
        """All trainable parts as stages, the first of which starts at step 0."""
        first = []
        if self.parts or self.blocks or self.last_blocks:
            first = [
                UnfreezeConfig(
                    step=0, parts=self.parts, blocks=self.blocks, last_blocks=self.last_blocks
                )
            ]
        return sorted([*first, *self.unfreeze], key=lambda stage: stage.step)

    @model_validator(mode="after")
    def _check_trainable_parameters(self) -> Self:
        stages = self.unfreeze_stages
        if self.sample_blocks is not None:
            return self
        if not stages:
            raise ValueError(
                "nothing would be trained; give parts, blocks, last_blocks or unfreeze"
            )
        if stages[0].step:
            raise ValueError(
                f"nothing is trained before step {stages[0].step}; give parts or blocks, or "
                "let a stage of unfreeze have step: 0"
            )
        return self
