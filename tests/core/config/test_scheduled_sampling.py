"""Keys of scheduled sampling: what is refused, with the key and the fix."""

from typing import Any

import pytest

from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import UserError


def make_tree(section: dict[str, Any], **data: Any) -> dict[str, Any]:
    return {
        "base": {"path": "b"},
        "data": {"train": ["x"], **data},
        "train": {"scheduled_sampling": section},
    }


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "linear needs c"),
        ({"c": 0.1, "k": 1.5}, r"probability k in \[0, 1\], not 1\.5"),
        ({"c": -0.1}, "train.scheduled_sampling.c"),
        ({"c": 0.1, "eps_min": 1.01}, "train.scheduled_sampling.eps_min"),
        ({"schedule": "exponential"}, r"exponential needs k, such as 0\.999"),
        ({"schedule": "exponential", "k": 1.0}, r"k in \(0, 1\), not 1"),
        ({"schedule": "exponential", "k": 0.9, "c": 0.1}, "c is the slope of schedule: linear"),
        ({"schedule": "inverse_sigmoid", "k": 0.5}, r"k of at least 1, not 0\.5"),
        ({"schedule": "cosine", "k": 0.5}, "train.scheduled_sampling.schedule"),
        ({"c": 0.1, "temperature": -1}, "train.scheduled_sampling.temperature"),
        ({"c": 0.1, "temprature": 1}, "temperature"),
    ],
)
def test_unfit_schedules_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(make_tree(section))


def test_prompts_and_classes_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.loss_on: all would replace prompts"):
        parse_config(make_tree({"c": 0.1}, loss_on="all"))
    labelled = [{"path": "x", "format": "classification", "labels": ["a", "b"]}]
    tree = make_tree({"c": 0.1}, train=labelled)
    tree["base"]["head"] = "classifier"
    with pytest.raises(UserError, match="predicts a class of a whole text"):
        parse_config(tree)


def test_defaults() -> None:
    section = parse_config(make_tree({"c": 0})).train.scheduled_sampling
    assert section is not None and (section.resolved_k, section.eps_min) == (1.0, 0.0)
    assert section.temperature == 0
