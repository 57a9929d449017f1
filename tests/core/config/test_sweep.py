from typing import Any

import pytest
from pydantic import ValidationError

from dist_peft.core.config.sweep import SweepConfig, SweepPoint


def test_grid_is_every_combination() -> None:
    sweep = SweepConfig(lr=[1e-4, 2e-4], r=[8, 16], target_modules=["all-linear", ["q_proj"]])
    points = sweep.list_points()
    assert len(points) == 8
    assert points[:2] == [
        SweepPoint(lr=1e-4, r=8, target_modules="all-linear"),
        SweepPoint(lr=1e-4, r=8, target_modules=["q_proj"]),
    ]
    assert points[-1] == SweepPoint(lr=2e-4, r=16, target_modules=["q_proj"])


def test_points_are_taken_as_given() -> None:
    given = [{"lr": 1e-4, "alpha": 8}, {"seed": 0}]
    assert SweepConfig(points=given).list_points() == [SweepPoint(**own) for own in given]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "2 to 256 points, not 0"),
        ({"lr": [1e-3]}, "2 to 256 points, not 1"),
        ({"seed": list(range(300))}, "not 300"),
        ({"lr": [1e-3, 1e-3]}, "points 0 and 1 are equal"),
        ({"lr": [1e-3, 1e-4], "points": [{"r": 2}, {"r": 3}]}, "lists such as lr, not both"),
        ({"points": [{"keep_zeros": True}, {}]}, "keep_zeros"),
        ({"lr": [1e-3, 1e-4], "halving": {"every": 2, "keep": 1.0}}, "keep"),
    ],
)
def test_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        SweepConfig(**values)
