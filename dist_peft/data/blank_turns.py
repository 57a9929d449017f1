"""Blank assistant turns: they would train on the end-of-turn token alone."""

from typing import Any

from dist_peft.data.files import RecordPlace
from dist_peft.data.message_weights import WEIGHT_KEYS
from dist_peft.data.tally import Tally

__all__ = ["BlankTurnFilter", "exclude_turn", "is_blank_turn"]

_NO_WORDS = ("role", "content", "name", *WEIGHT_KEYS)


def is_blank_turn(message: dict[str, Any]) -> bool:
    """Return whether an assistant message has no text, no tool call and no reasoning."""
    if message["role"] != "assistant" or str(message.get("content") or "").strip():
        return False
    return not any(value for key, value in message.items() if key not in _NO_WORDS)


def exclude_turn(message: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of ``message`` marked as not contributing to the loss."""
    return {**{k: v for k, v in message.items() if k not in WEIGHT_KEYS}, "train": False}


class BlankTurnFilter:
    """Exclude blank assistant turns from the loss and count them.

    Attributes:
        turns: number of these turns.
    """

    def __init__(self) -> None:
        self.turns = Tally()

    def exclude_blank_turns(
        self, messages: list[dict[str, Any]], place: RecordPlace
    ) -> list[dict[str, Any]]:
        """Return ``messages`` with the blank assistant turns excluded from the loss."""
        blank = [is_blank_turn(message) for message in messages]
        if any(blank):
            self.turns.count("", place, sum(blank))
        return [
            exclude_turn(message) if empty else message
            for message, empty in zip(messages, blank, strict=True)
        ]

    @property
    def user_notes(self) -> list[str]:
        """One-time warnings for the user."""
        return [
            f"{count} assistant turns are empty and do not contribute to the loss; the "
            f"first is in {first}"
            for _, count, first in self.turns.list_entries()
        ]
