"""Multiple-choice questions as rows, one for each answer: what scoring by likelihood reads.

A question is ``{"prompt": text, "choices": [text, ...], "answer": index}``; its answers become
consecutive rows ``prompt + choice`` in which only the choice's tokens count::

    row 0   <s> Where do fish live ? Answer: in the sea      labels: - - - - - - - in the sea
    row 1   <s> Where do fish live ? Answer: in trees        labels: - - - - - - - in trees

The prompt takes the special tokens that the tokenizer puts before a text; the choice follows with
none of its own and no end-of-text token, as in the common evaluation harnesses.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_peft.core.errors import UserError
from dist_peft.data.packing import IGNORE
from dist_peft.data.tokens import Tokenizer

__all__ = ["ChoiceRows", "Question", "read_questions"]


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        prompt: what stands before every choice.
        choices: at least two; begin with the space that separates them from the prompt.
        answer: index of the right one.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path: Path) -> list[Question]:
    """Questions of a JSON Lines file.

    Raises:
        UserError: unreadable or empty file, or a line that is no question.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read questions from {path}: {error}") from None
    questions = [
        _question(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line
    ]
    if not questions:
        raise UserError(f"{path} has no question")
    return questions


def _question(line: str, place: str) -> Question:
    form = '{"prompt": text, "choices": [text, text, ...], "answer": index}'
    try:
        record: Any = json.loads(line)
        prompt, choices, answer = (record[key] for key in ("prompt", "choices", "answer"))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{place}: no question of the form {form}") from None
    texts = isinstance(choices, list) and len(choices) > 1
    texts = texts and all(isinstance(text, str) and text for text in [prompt, *choices])
    if not texts or type(answer) is not int or not 0 <= answer < len(choices):
        raise UserError(f"{place}: no question of the form {form}")
    return Question(prompt, tuple(choices), answer)


class ChoiceRows:
    """The answers of all questions as rows of a ``data.loader.Loader``.

    Attributes:
        packed: never.
        seq_len: the most tokens a row may have.
        longest: tokens of the longest row.
        largest_token: of all rows.
    """

    packed = False

    def __init__(self, questions: Sequence[Question], tokenizer: Tokenizer, seq_len: int) -> None:
        """Tokenize.

        Raises:
            UserError: a row is longer than ``seq_len``, or a choice has no token.
        """
        self.seq_len = seq_len
        self._rows: list[tuple[list[int], int]] = []  # tokens, and how many belong to the prompt
        for number, question in enumerate(questions):
            prompt: list[int] = tokenizer(question.prompt)["input_ids"]
            end = tokenizer.eos_token_id
            if prompt and prompt[-1] == end and len(prompt) > 1:
                prompt = prompt[:-1]  # some tokenizers close every text
            for choice in question.choices:
                tokens = tokenizer(choice, add_special_tokens=False)["input_ids"]
                if not prompt or not tokens:
                    raise UserError(f"question {number}: {choice!r} has no tokens")
                if len(prompt) + len(tokens) > seq_len:
                    raise UserError(
                        f"question {number} has {len(prompt) + len(tokens)} tokens with its answer "
                        f"{choice!r}, more than data.seq_len {seq_len}; raise it or leave it out"
                    )
                self._rows.append(([*prompt, *tokens], len(prompt)))
        self.longest = max(len(tokens) for tokens, _ in self._rows)
        self.largest_token = max(max(tokens) for tokens, _ in self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def num_targets(self, index: int) -> int:
        """Tokens of the choice."""
        tokens, prompt = self._rows[index]
        return len(tokens) - prompt

    def row(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """tokens, labels, positions: LongTensors [T]; see ``RowSet.row``."""
        tokens, prompt = self._rows[index]
        labels = [IGNORE] * (prompt - 1) + tokens[prompt:] + [IGNORE]
        return torch.tensor(tokens), torch.tensor(labels), torch.arange(len(tokens))
