"""Tokens that end trained documents."""

import torch
from torch import Tensor

from dist_peft.data.turn_end import find_turn_end_ids

EOS, IM_END, NEWLINE = 2, 90, 7


class FakeRows:
    """Rows of documents given as their targets, each after a prompt of two tokens."""

    def __init__(self, *rows: list[list[int]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def get_sequence(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        labels, positions = [], []
        for targets in self.rows[index]:
            own = [-100, -100, *targets, -100]
            labels += own
            positions += range(len(own))
        return torch.zeros(len(labels)), torch.tensor(labels), torch.tensor(positions)


def test_last_special_target_of_each_document() -> None:
    rows = FakeRows([[11, 12, IM_END, NEWLINE], [13, IM_END, NEWLINE]], [[14, IM_END]])
    assert find_turn_end_ids(rows, {EOS, IM_END}) == [IM_END]
    assert find_turn_end_ids(rows, {EOS}) == []


def test_ends_of_several_sources_and_of_few_documents() -> None:
    rows = FakeRows(*[[[5, IM_END]]] * 12, *[[[5, EOS]]] * 7, [[5, 91]])
    assert find_turn_end_ids(rows, {EOS, IM_END, 91}) == [IM_END, EOS]


def test_specials_inside_a_document_are_no_end() -> None:
    assert find_turn_end_ids(FakeRows([[IM_END, 11, 12, 13, 14]], [[]]), {IM_END}) == []
    many = FakeRows(*[[[i % 60, EOS]] for i in range(3, 1000)])
    assert find_turn_end_ids(many, {EOS}) == [EOS]
