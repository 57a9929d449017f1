"""Parts of a sequence: their text together is the sequence's, their marks are its labels'."""

import torch
from torch import Tensor

from dist_peft.data.sequence_text import (
    SequencePart,
    color_sequence,
    format_sequence,
    split_sequence_text,
)
from tests.support.data_files import byte_tokenizer


class OneSequence:
    """Documents "pq" + "x" and "r" + "yz"; the second texts are in the loss."""

    def __init__(self) -> None:
        tokenizer = byte_tokenizer()
        self.tokens = torch.tensor(tokenizer("pqxryz", add_special_tokens=False)["input_ids"])
        loss = [False, False, True, False, True, True]
        shifted = [(self.tokens[t + 1] if loss[t + 1] else -100) for t in range(5)]
        self.labels = torch.tensor([*shifted, -100])
        self.positions = torch.tensor([0, 1, 2, 0, 1, 2])

    def get_sequence(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.tokens, self.labels, self.positions


def test_parts_brackets_and_colours() -> None:
    parts = split_sequence_text(OneSequence(), 0, byte_tokenizer())
    assert parts == [
        SequencePart("pq", False),
        SequencePart("x", True),
        SequencePart("r", False, begins=True),
        SequencePart("yz", True),
    ]
    assert format_sequence(OneSequence(), 0, byte_tokenizer()) == "pq[[x]] || r[[yz]]"
    colored = color_sequence(parts)
    assert colored.count("\x1b[1;32m") == 2 and colored.count("\x1b[0m") == 4
    for code in ("\x1b[1;32m", "\x1b[2m", "\x1b[0m"):
        colored = colored.replace(code, "")
    assert colored == "pqx || ryz"


def test_first_token_is_no_target_and_documents_of_targets_stay_apart() -> None:
    rows = OneSequence()
    rows.labels = torch.tensor([rows.tokens[1], rows.tokens[2], -100, rows.tokens[4], -100, -100])
    assert format_sequence(rows, 0, byte_tokenizer()) == "p[[qx]] || r[[y]]z"
