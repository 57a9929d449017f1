"""Keys of a record's messages that set whether they contribute to the loss.

========================================= ===================================================
key of a message                          where it is used
========================================= ===================================================
``weight``: 0 or 1                        OpenAI's fine-tuning format, of assistant messages
``train``, ``trainable``: truth value     conversations whose earlier answers are context only
``loss_mask``: 0 or 1                     the same as a number; 1 contributes
========================================= ===================================================
"""

from typing import Any

from dist_peft.core.errors import UserError

__all__ = ["WEIGHT_KEYS", "contributes_to_loss", "is_excluded_from_loss", "strip_weight_keys"]

WEIGHT_KEYS = ("weight", "train", "trainable", "loss_mask")

_FALSE = ("0", "false", "no")
_TRUE = ("1", "true", "yes")


def contributes_to_loss(message: dict[str, Any], where: str) -> bool:
    """Return whether ``message`` is trained on: an assistant message that no key excludes.

    Raises:
        UserError: a weight that is neither 0 nor 1, keys that contradict each other, or another
            role's message that is to be trained on.
    """
    said = {
        key: _parse_truth_value(message[key], key, where) for key in WEIGHT_KEYS if key in message
    }
    if message["role"] != "assistant":
        wanted = [key for key, value in said.items() if value and key != "weight"]
        if wanted:
            raise UserError(
                f"{where} ({message['role']}): {wanted[0]} asks to train on it, but only assistant "
                "messages contribute to the loss; remove the key, or set data.loss_on: all"
            )
        return False
    if len(set(said.values())) > 1:
        raise UserError(f"{where}: {' and '.join(said)} contradict each other; keep one of them")
    return all(said.values())


def is_excluded_from_loss(message: dict[str, Any], where: str) -> bool:
    """Return whether a key excludes ``message``, of any role, from the loss on all text.

    Raises:
        UserError: a weight that is neither 0 nor 1, or keys that contradict each other.
    """
    said = {
        key: _parse_truth_value(message[key], key, where) for key in WEIGHT_KEYS if key in message
    }
    if len(set(said.values())) > 1:
        raise UserError(f"{where}: {' and '.join(said)} contradict each other; keep one of them")
    return not all(said.values())


def strip_weight_keys(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages without the weight keys, which are not for the template."""
    return [{k: v for k, v in message.items() if k not in WEIGHT_KEYS} for message in messages]


def _parse_truth_value(value: Any, key: str, where: str) -> bool:
    text = str(value).strip().lower()
    if isinstance(value, bool | str) and text in (*_FALSE, *_TRUE):
        return text in _TRUE
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    raise UserError(
        f"{where}: {key} is {value!r:.40}, but a message contributes to the loss or does not; set "
        "it to 0 or 1, or remove it"
    )
