"""Answers by likelihood, against a slow reference, at one and three ranks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_peft.core.world import World
from dist_peft.data.loader import SingleTask, TokenLoader
from dist_peft.data.multiple_choice import ChoiceQuestion
from dist_peft.train.option_scores import ChoiceResult, evaluate_choices
from tests.support.dist import run_ranks

QUESTIONS = [
    ChoiceQuestion("a", ("x", "yy"), 0),
    ChoiceQuestion("a", ("x", "yy", "zzz"), 1),
    ChoiceQuestion("b", ("x", "y"), 1),
]
ROWS = [
    ([1, 2], [2, -100]),
    ([1, 3, 4], [3, 4, -100]),
    ([1, 2], [2, -100]),
    ([1, 3, 4], [3, 4, -100]),
    ([1, 5, 6, 7], [5, 6, 7, -100]),
    ([2, 4], [4, -100]),
    ([2, 1], [1, -100]),
]


class Rows(SingleTask):
    packed, seq_len, longest, largest_token = False, 4, 4, 7

    def __len__(self) -> int:
        return len(ROWS)

    def num_targets(self, index: int) -> int:
        return sum(label >= 0 for label in ROWS[index][1])

    def get_sequence(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        tokens, labels = (torch.tensor(part) for part in ROWS[index])
        return tokens, labels, torch.arange(len(tokens))


class Bigrams(nn.Module):
    """Logits of the next token depend on the token alone."""

    class Config:
        model_type = "bigrams"
        _attn_implementation = "eager"

    config = Config()

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(3)))

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        class Output:
            logits = self.table[input_ids]

        return Output


class Engine:
    device = torch.device("cpu")


def answers(world: World) -> ChoiceResult:
    loader = TokenLoader(
        Rows(),
        global_batch=4,
        micro_batch=2,
        seed=0,
        shuffle=False,
        data_rank=world.data_rank,
        data_size=world.data_size,
        seq_len=4,
        pad_id=0,
    )
    return evaluate_choices(Bigrams(), Engine(), QUESTIONS, loader, world)  # type: ignore[arg-type]


def expected() -> ChoiceResult:
    table = Bigrams().table.detach().double().log_softmax(-1).tolist()
    scores = [math.fsum(table[t][u] for t, u in zip(*row, strict=True) if u >= 0) for row in ROWS]
    right = right_norm = place = 0
    for question in QUESTIONS:
        own = scores[place : place + len(question.choices)]
        norm = [s / len(c) for s, c in zip(own, question.choices, strict=True)]
        right += own.index(max(own)) == question.answer
        right_norm += norm.index(max(norm)) == question.answer
        place += len(own)
    return ChoiceResult(3, right / 3, right_norm / 3)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 3])
def test_as_the_reference(ranks: int) -> None:
    assert run_ranks(answers, ranks) == [expected()] * ranks
