"""Sections of the methods on linears."""

import pytest

from dist_peft.core.config.low_rank import LohaConfig, LokrConfig, LowRankConfig, VeraConfig
from dist_peft.core.config.run import LoraConfig


def test_defaults_are_pefts() -> None:
    assert (LohaConfig().r, LohaConfig().alpha) == (8, 8.0)
    assert (LokrConfig().r, LokrConfig().alpha) == (8, 8.0)
    vera = VeraConfig()
    assert (vera.r, vera.d_initial, vera.projection_seed) == (256, 0.1, 0) and vera.save_projection
    assert issubclass(LoraConfig, LowRankConfig) and not issubclass(VeraConfig, LowRankConfig)


@pytest.mark.parametrize(
    ("section", "wrong", "words"),
    [
        (VeraConfig, {"d_initial": 0}, "greater than 0"),
        (VeraConfig, {"alpha": 3}, "Extra inputs"),
        (LokrConfig, {"decompose_factor": 1}, "greater than or equal to 2"),
        (LohaConfig, {"r": 0}, "greater than or equal to 1"),
        (LohaConfig, {"rank_pattern": {"q": 0}}, "greater than or equal to 1"),
    ],
)
def test_refused(section: type[LowRankConfig], wrong: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        section(**wrong)  # type: ignore[arg-type]
