"""The section ``base.quant``."""

import pytest
from pydantic import ValidationError

from dist_peft.core.config.quantization import QuantConfig


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"bits": 3}, "nf4 has 4 bits, not 3; use kind: int"),
        ({"solver": "hqq"}, "nf4 rounds to nearest; solver hqq is for kind: int"),
        ({"kind": "int", "solver": "gptq", "embeddings": True}, "use solver hqq"),
        ({"group_size": 36}, "group_size 36 is not a multiple of 8"),
    ],
)
def test_options_that_do_not_fit(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        QuantConfig.model_validate(keys)


def test_options_that_fit() -> None:
    assert QuantConfig().kind == "nf4" and not QuantConfig().embeddings
    found = QuantConfig(kind="int", bits=2, solver="hqq", embeddings=True, group_size=24)
    assert (found.bits, found.group_size) == (2, 24)
