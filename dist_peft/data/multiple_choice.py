"""Multiple-choice questions as sequences, one for each choice, to be scored by likelihood.

A question is ``{"prompt": text, "choices": [text, ...], "answer": index}``; its choices become
consecutive sequences ``prompt + choice`` in which only the choice's tokens are targets::

    seq 0   <s> Where do fish live ? Answer: in the sea      labels: - - - - - - - in the sea
    seq 1   <s> Where do fish live ? Answer: in trees        labels: - - - - - - - in trees

The prompt has the special tokens that the tokenizer puts before a text; the choice is appended
without special tokens and without an end-of-text token, as in common evaluation harnesses.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_peft.core.errors import UserError
from dist_peft.core.input_paths import refuse_special_file
from dist_peft.data.loader import SingleTask
from dist_peft.data.packing import IGNORE
from dist_peft.data.tokens import Tokenizer

__all__ = ["ChoiceQuestion", "ChoiceSequences", "read_choice_questions"]


@dataclass(frozen=True)
class ChoiceQuestion:
    """One multiple-choice question.

    Attributes:
        prompt: text before every choice.
        choices: at least two; start with the space that separates them from the prompt.
        answer: index of the correct choice.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int


def read_choice_questions(path: Path) -> list[ChoiceQuestion]:
    """Read the questions of a JSON Lines file.

    Raises:
        UserError: unreadable or empty file, or a line that is not a question.
    """
    refuse_special_file(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read questions from {path}: {error}") from None
    questions = [
        _parse_question(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line
    ]
    if not questions:
        raise UserError(f"{path} has no question")
    return questions


def _parse_question(line: str, place: str) -> ChoiceQuestion:
    form = '{"prompt": text, "choices": [text, text, ...], "answer": index}'
    try:
        record: Any = json.loads(line)
        prompt, choices, answer = (record[key] for key in ("prompt", "choices", "answer"))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{place}: not a question of the form {form}") from None
    texts = isinstance(choices, list) and len(choices) > 1
    texts = texts and all(isinstance(text, str) and text for text in [prompt, *choices])
    if not texts or type(answer) is not int or not 0 <= answer < len(choices):
        raise UserError(f"{place}: not a question of the form {form}")
    return ChoiceQuestion(prompt, tuple(choices), answer)


class ChoiceSequences(SingleTask):
    """The choices of all questions as sequences of a ``data.loader.Loader``.

    Attributes:
        packed: always False.
        seq_len: maximum number of tokens of a sequence.
        longest: tokens of the longest sequence.
        largest_token: largest token id.
    """

    packed = False

    def __init__(
        self, questions: Sequence[ChoiceQuestion], tokenizer: Tokenizer, seq_len: int
    ) -> None:
        """Tokenize all choices.

        Raises:
            UserError: a sequence is longer than ``seq_len``, or a choice has no token.
        """
        self.seq_len = seq_len
        self._rows: list[tuple[list[int], int]] = []  # tokens, number of prompt tokens
        for number, question in enumerate(questions):
            prompt: list[int] = tokenizer(question.prompt)["input_ids"]
            end = tokenizer.eos_token_id
            if prompt and prompt[-1] == end and len(prompt) > 1:
                prompt = prompt[:-1]  # some tokenizers append eos to every text
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
        """Return the number of tokens of the choice."""
        tokens, prompt = self._rows[index]
        return len(tokens) - prompt

    def get_sequence(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return tokens, labels (-100: no target) and positions: LongTensors [T]."""
        tokens, prompt = self._rows[index]
        labels = [IGNORE] * (prompt - 1) + tokens[prompt:] + [IGNORE]
        return torch.tensor(tokens), torch.tensor(labels), torch.arange(len(tokens))
