"""Examples that records become, before tokens."""

from dataclasses import dataclass
from typing import Any

from dist_peft.data.alpaca import Turn

__all__ = ["ChatExample", "CompletionExample", "Example", "LabelledExample", "TextExample"]


@dataclass(frozen=True)
class CompletionExample:
    """Train on ``completion`` as the continuation of ``prompt``.

    Attributes:
        earlier: turns before, (context, target text) each; ``prompt`` follows the last.
    """

    prompt: str
    completion: str
    earlier: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class ChatExample:
    """Messages with at least ``role`` and, except pure tool calls, a string ``content``."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class TextExample:
    """A document; every token contributes to the loss."""

    text: str


@dataclass(frozen=True)
class LabelledExample:
    """One or two texts with a class: ``label`` is an index into the labels of the source, or
    -1 without one."""

    text: str
    text_pair: str | None
    label: int


Example = CompletionExample | ChatExample | TextExample | LabelledExample
