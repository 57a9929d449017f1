"""Combinations of ``base.quant`` that are refused; ``test_run`` has the sections together."""

from typing import Any

import pytest
from pydantic import ValidationError

from dist_peft.core.config.quantization import QuantConfig
from dist_peft.core.config.run import BaseConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 8}, "nf4 has 4 bits, not 8"),
        ({"solver": "hqq"}, "nf4 rounds to nearest"),
        ({"group_size": 12}, "not a multiple of 8"),
        ({"kind": "int", "solver": "gptq", "embeddings": True}, "embeddings: true quantizes while"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        QuantConfig(**fields)


def test_embeddings_are_plain_by_default() -> None:
    default = BaseConfig(path="base").quant
    assert default == QuantConfig() and default is not None and not default.embeddings
    assert QuantConfig(kind="int", solver="hqq", embeddings=True).embeddings
