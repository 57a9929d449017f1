"""Sequences as text: the parts that are in the loss, marked with brackets or colours."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dist_peft.data.packing import IGNORE
from dist_peft.data.tokens import Tokenizer

__all__ = ["SequencePart", "color_sequence", "format_sequence", "split_sequence_text"]

_TARGET, _CONTEXT, _RESET = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


class _Sequences(Protocol):
    def get_sequence(self, index: int) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True)
class SequencePart:
    """Consecutive tokens of one document that are all in the loss, or all not.

    Attributes:
        begins: a further document of the sequence begins with it.
    """

    text: str
    in_loss: bool
    begins: bool = False


def split_sequence_text(rows: _Sequences, index: int, tokenizer: Tokenizer) -> list[SequencePart]:
    """Return the parts of sequence ``index``, which together are its text.

    Args:
        rows: sequences of tokens, shifted labels and positions.
    """
    tokens, labels, positions = rows.get_sequence(index)
    parts: list[SequencePart] = []
    run: list[int] = []
    in_loss = begins = False
    for t, token in enumerate(tokens.tolist()):
        is_first = int(positions[t]) == 0
        is_target = not is_first and int(labels[t - 1]) != IGNORE
        if t and (is_target != in_loss or is_first):
            parts.append(SequencePart(str(tokenizer.decode(run)), in_loss, begins))
            run, begins = [], is_first
        in_loss = is_target
        run.append(token)
    return [*parts, SequencePart(str(tokenizer.decode(run)), in_loss, begins)]


def format_sequence(rows: _Sequences, index: int, tokenizer: Tokenizer) -> str:
    """Return a sequence as text: ``[[...]]`` is in the loss, ``||`` separates documents."""
    return "".join(
        f"{' || ' if part.begins else ''}{f'[[{part.text}]]' if part.in_loss else part.text}"
        for part in split_sequence_text(rows, index, tokenizer)
    )


def color_sequence(parts: list[SequencePart]) -> str:
    """Return parts with ANSI colours: bold green is in the loss, the rest dim."""
    return "".join(
        f"{' || ' if part.begins else ''}{_TARGET if part.in_loss else _CONTEXT}{part.text}{_RESET}"
        for part in parts
    )
