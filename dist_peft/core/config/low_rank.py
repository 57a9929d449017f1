"""``adapter`` sections of methods that add a change of few parameters to linears."""

from typing import Literal, Self

from pydantic import Field, model_validator

from dist_peft.core.config.types import ConfigSection, Float, Int, Names, Positive, Size

__all__ = [
    "AdaLoraConfig",
    "LinearsConfig",
    "LohaConfig",
    "LokrConfig",
    "LowRankConfig",
    "VeraConfig",
]


class LinearsConfig(ConfigSection):
    """Options shared by all of them."""

    kind: str
    dropout: Float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: Literal["all-linear"] | Names = Field(
        "all-linear",
        description="all-linear: every linear inside the blocks, and experts. Or a list: names, "
        "name endings or regular expressions, as in PEFT.",
    )


class LowRankConfig(LinearsConfig):
    """Options shared by LoRA, QA-LoRA, LoHa and LoKr."""

    r: Size = Field(16, description="Rank.")
    alpha: Float = Field(32.0, gt=0, description="Scaling is alpha / r (rslora: alpha / sqrt(r)).")
    rank_pattern: dict[str, Size] = Field(
        default_factory=dict, description="Regular expression or name ending -> other rank."
    )
    alpha_pattern: dict[str, Positive] = Field(
        default_factory=dict, description="Regular expression or name ending -> other alpha."
    )


class VeraConfig(LinearsConfig):
    """VeRA (Kopiczko et al. 2024): vectors that scale random projections shared by all linears."""

    kind: Literal["vera"] = "vera"
    r: Size = Field(256, description="Rank of the frozen projections.")
    d_initial: Float = Field(0.1, gt=0, description="Initial value of the vector on the rank.")
    projection_seed: Int = Field(
        0, ge=0, description="Seed of the projections; PEFT's projection_prng_key."
    )
    save_projection: bool = Field(
        True,
        description="Write the projections into the adapter. false: whoever reads it generates "
        "them from the seed, with the same generator of PyTorch.",
    )


class LohaConfig(LowRankConfig):
    """LoHa (Hyeon-Woo et al. 2022, FedPara): the elementwise product of two low-rank products."""

    kind: Literal["loha"] = "loha"
    r: Size = Field(8, description="Rank of each product; the change has up to the square of it.")
    alpha: Float = Field(8.0, gt=0, description="Scaling is alpha / r.")


class LokrConfig(LowRankConfig):
    """LoKr (Edalati et al. 2022; Yeh et al. 2024): a Kronecker product of two small matrices."""

    kind: Literal["lokr"] = "lokr"
    r: Size = Field(
        8,
        description="Rank of the second matrix where that is less than half its larger side; "
        "else it is trained whole, and r is only part of the scaling.",
    )
    alpha: Float = Field(8.0, gt=0, description="Scaling is alpha / r.")
    decompose_factor: Int | None = Field(
        None,
        ge=2,
        le=2**16,
        description="Sides of the first matrix: this, or where it divides no side the nearest "
        "smaller divisor, as in PEFT. Default: the divisor nearest to the square root.",
    )
    decompose_both: bool = Field(
        False, description="The first matrix has rank r too, where that makes it smaller."
    )


class AdaLoraConfig(LinearsConfig):
    """AdaLoRA (Zhang et al. 2023): LoRA as a singular value decomposition, whose ranks are lowered
    where they matter least."""

    kind: Literal["adalora"] = "adalora"
    init_r: Size = Field(12, description="Rank of each linear at the start.")
    target_r: Size = Field(8, description="Mean rank of the linears at the end.")
    alpha: Float = Field(32.0, gt=0, description="Scaling is alpha / init_r.")
    tinit: Int = Field(0, ge=0, description="Steps before ranks are lowered.")
    tfinal: Int = Field(0, ge=0, description="Last steps, in which the ranks stay.")
    delta_t: Int = Field(1, ge=1, description="Ranks are lowered every so many steps.")
    beta1: Float = Field(0.85, gt=0, lt=1, description="Smoothing of the sensitivity.")
    beta2: Float = Field(0.85, gt=0, lt=1, description="Smoothing of its uncertainty.")
    orth_reg_weight: Float = Field(
        0.5, ge=0, description="Weight of the orthogonality penalty; 0: none."
    )

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        if self.target_r > self.init_r:
            raise ValueError(
                f"target_r {self.target_r} is more than init_r {self.init_r}; ranks only become "
                "smaller"
            )
        return self
