"""``data.train[].augment``: variants of the records of a training source."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dist_peft.core.config.types import ConfigSection, Float, Int, Names, PathText

__all__ = ["AugmentConfig", "EdaConfig", "FunctionAugmentConfig", "TokenDropoutConfig"]

_NumAug = Annotated[
    Int,
    Field(
        ge=1,
        le=64,
        description="Variants of each record. Epoch 0 has the originals, epoch k variant k; after "
        "num_aug + 1 epochs they repeat.",
    ),
]
_Fields = Annotated[
    Names | None,
    Field(
        description="Roles whose text is changed. Default: text and text_pair; prompt (or the "
        "columns of the template); instruction and input; the user's turns of messages."
    ),
]
_Seed = Annotated[
    Int, Field(ge=0, description="Variants are drawn from it and the text of the record alone.")
]
_Share = Annotated[Float, Field(ge=0, le=1)]


class EdaConfig(ConfigSection):
    """Synonym replacement, random insertion, swap and deletion of words (Wei & Zou 2019)."""

    kind: Literal["eda"] = "eda"
    num_aug: _NumAug = 4
    alpha_sr: _Share = Field(
        0.1, description="Synonym replacement: share of the words, at least one; 0: not used."
    )
    alpha_ri: _Share = Field(
        0.1, description="Random insertion of a synonym: share of the words; 0: not used."
    )
    alpha_rs: _Share = Field(
        0.1, description="Random swap: swaps as a share of the words; 0: not used."
    )
    p_rd: _Share = Field(0.1, description="Random deletion: probability of each word; 0: not used.")
    synonyms: PathText | None = Field(
        None,
        description="Lines word: synonym, synonym. Required unless alpha_sr and alpha_ri are 0.",
    )
    letters_only: bool = Field(
        False,
        description="Lower-case variants and keep a to z and spaces only, as the authors' program.",
    )
    fields: _Fields = None
    seed: _Seed = 0

    @model_validator(mode="after")
    def _check_eda(self) -> Self:
        if not (self.alpha_sr or self.alpha_ri or self.alpha_rs or self.p_rd):
            raise ValueError(
                "alpha_sr, alpha_ri, alpha_rs and p_rd are all 0: nothing would change"
            )
        if self.synonyms is None and (self.alpha_sr or self.alpha_ri):
            raise ValueError(
                "synonyms is missing: give a file with lines such as 'good: fine, nice', or set "
                "alpha_sr and alpha_ri to 0"
            )
        return self


class TokenDropoutConfig(ConfigSection):
    """Each token of the tokenizer is left out with a probability."""

    kind: Literal["token_dropout"] = "token_dropout"
    num_aug: _NumAug = 4
    p: Float = Field(0.1, gt=0, lt=1, description="Probability of each token.")
    fields: _Fields = None
    seed: _Seed = 0


class FunctionAugmentConfig(ConfigSection):
    """A function of yours, (text, random.Random) -> text; needs data.allow_code=true."""

    kind: Literal["function"] = "function"
    num_aug: _NumAug = 4
    function: str = Field(
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$",
        description="package.module:name, looked for in the working directory, too.",
    )
    fields: _Fields = None
    seed: _Seed = 0


AugmentConfig = Annotated[
    EdaConfig | TokenDropoutConfig | FunctionAugmentConfig, Field(discriminator="kind")
]
