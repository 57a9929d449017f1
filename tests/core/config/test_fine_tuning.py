"""Which weights of the base are trained, and when."""

from typing import Any

import pytest

from dist_peft.core.config.fine_tuning import PartialConfig


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, "nothing would be trained; give parts, blocks"),
        (
            {"unfreeze": [{"step": 3, "until": 3, "blocks": [0]}]},
            "until 3 is not after step 3",
        ),
        ({"blocks": [-1]}, "greater than or equal to 0"),
        (
            {"unfreeze": [{"step": 3, "last_blocks": 1}]},
            "nothing is trained before step 3",
        ),
        (
            {"last_blocks": 1, "unfreeze": [{"step": 3}]},
            "names nothing to train",
        ),
    ],
)
def test_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PartialConfig(**wrong)


def test_stages_are_sorted_by_their_first_step() -> None:
    config = PartialConfig.model_validate(
        {
            "blocks": [2],
            "unfreeze": [{"step": 5, "parts": ["all"]}, {"step": 1, "until": 2, "last_blocks": 1}],
        }
    )
    assert [(stage.step, stage.until) for stage in config.unfreeze_stages] == [
        (0, None),
        (1, 2),
        (5, None),
    ]
    assert config.unfreeze_stages[0].blocks == [2]
    assert PartialConfig(sample_blocks={"count": 1}).unfreeze_stages == []  # type: ignore[arg-type]
