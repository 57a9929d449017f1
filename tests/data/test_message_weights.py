from typing import Any

import pytest

from dist_peft.core.errors import UserError
from dist_peft.data.message_weights import contributes_to_loss, strip_weight_keys


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({}, True),
        ({"weight": 0}, False),
        ({"weight": 1.0}, True),
        ({"train": False}, False),
        ({"trainable": "false"}, False),
        ({"loss_mask": 0}, False),
        ({"loss_mask": 1, "train": True}, True),
    ],
)
def test_keys_of_an_assistant_message(keys: dict[str, Any], wanted: bool) -> None:
    message = {"role": "assistant", "content": "a", **keys}
    assert contributes_to_loss(message, "m") is wanted
    assert strip_weight_keys([message]) == [{"role": "assistant", "content": "a"}]


def test_other_roles_never_contribute() -> None:
    assert not contributes_to_loss({"role": "user", "weight": 1}, "m")
    assert not contributes_to_loss({"role": "system", "train": False}, "m")
    with pytest.raises(UserError, match=r"m \(user\): train asks to train on it"):
        contributes_to_loss({"role": "user", "train": True}, "m")


@pytest.mark.parametrize("keys", [{"weight": 0.5}, {"train": "maybe"}, {"loss_mask": [0, 1]}])
def test_anything_else_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"m: {next(iter(keys))} is .*set it to 0 or 1"):
        contributes_to_loss({"role": "assistant", **keys}, "m")


def test_contradiction_is_refused() -> None:
    with pytest.raises(UserError, match="weight and train contradict"):
        contributes_to_loss({"role": "assistant", "weight": 0, "train": True}, "m")
