"""The strictness of every section."""

import pytest
from pydantic import Field, ValidationError

from dist_peft.core.config.types import Beta, ConfigSection, Count, Float, Int, Names, Positive


class _Example(ConfigSection):
    whole: Int = 1
    number: Float = 1.0
    count: Count = 1
    positive: Positive = 1.0
    beta: Beta = 0.0
    names: Names = Field(default_factory=lambda: ["a"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"whole": True},
        {"number": False},
        {"number": float("nan")},
        {"count": 0},
        {"positive": 0.0},
        {"beta": 1.0},
        {"names": []},
        {"unknown": 1},
    ],
)
def test_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        _Example.model_validate(wrong)


def test_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        _Example().whole = 2  # type: ignore[misc]
