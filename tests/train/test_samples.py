"""Prompts are those of the data; the batch continues each as it is continued alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_peft.train.samples import SamplePrompt, continue_greedily, select_sample_prompts
from tests.support.adapters import tiny_llama

IGNORE = -100


class Rows:
    """Sequences of documents, each as tokens and the number of its prompt tokens."""

    def __init__(self, *sequences: list[tuple[list[int], int]]) -> None:
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def get_sequence(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        tokens, labels, positions = [], [], []
        for document, prompt in self.sequences[index]:
            tokens += document
            labels += [IGNORE] * (prompt - 1) + document[max(prompt, 1) :] + [IGNORE]
            positions += range(len(document))
        return torch.tensor(tokens), torch.tensor(labels), torch.tensor(positions)


def test_prompt_ends_at_the_first_target() -> None:
    rows = Rows([([1, 5, 6, 7, 8, 2], 3), ([1, 9, 2], 1)], [([1, 4, 2], 2)])
    assert select_sample_prompts(rows, 2, 10) == [
        SamplePrompt([1, 5, 6], [7, 8, 2]),
        SamplePrompt([1, 4], [2]),
    ]


def test_turns_after_the_first_answer_are_not_expected() -> None:
    class Turns(Rows):
        def get_sequence(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
            labels = torch.tensor([IGNORE, 6, 7, IGNORE, IGNORE, 9, IGNORE])
            return torch.tensor([1, 5, 6, 7, 8, 8, 9]), labels, torch.arange(7)

    assert select_sample_prompts(Turns([]), 1, 10) == [SamplePrompt([1, 5], [6, 7])]


def test_first_half_of_a_text() -> None:
    text = list(range(20, 30))
    (short,) = select_sample_prompts(Rows([(text, 0)]), 1, 99)
    assert short.tokens == text[:4] and short.expected == text[4:]
    (long,) = select_sample_prompts(Rows([(list(range(90)), 0)]), 1, 99)
    assert long.tokens == list(range(32))


def test_prompts_that_fit_come_first_and_longer_ones_are_cut() -> None:
    rows = Rows([([*range(10), 60], 10)], [([1, 7, 61], 2)], [([*range(30, 40), 62], 10)])
    assert select_sample_prompts(rows, 2, 4) == [
        SamplePrompt([1, 7], [61]),
        SamplePrompt([6, 7, 8, 9], [60]),
    ]


def test_rows_without_a_target_give_no_prompt() -> None:
    class NoTargets(Rows):
        def get_sequence(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
            return torch.tensor([1, 2]), torch.tensor([IGNORE, IGNORE]), torch.arange(2)

    assert select_sample_prompts(NoTargets([], []), 2, 4) == []


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama().eval()


def continue_alone(model: Any, tokens: list[int], count: int) -> list[int]:
    for _ in range(count):
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        tokens = [*tokens, int(logits[0, -1].argmax())]
    return tokens[-count:]


@torch.no_grad()
def test_each_row_is_continued_as_alone(model: nn.Module) -> None:
    prompts = [SamplePrompt(t, []) for t in ([1, 5, 9, 3, 7, 8], [4], [6, 2, 5])]
    sent: list[Tensor] = []
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "pad_id": 0,
        "device": torch.device("cpu"),
        "share": lambda tokens: sent.append(tokens.clone()),
    }
    found = continue_greedily(model, prompts, stop_ids=[], **options)
    assert found == [continue_alone(model, prompt.tokens, 6) for prompt in prompts]
    assert torch.stack(sent, 1).tolist() == found

    stop = found[0][2]  # the others go on, unless they have it too
    stopped = continue_greedily(model, prompts, stop_ids=[stop], **options)
    for whole, row in zip(found, stopped, strict=True):
        end = whole.index(stop) + 1 if stop in whole else 6
        assert row == whole[:end]

    def say_nine(tokens: Tensor) -> None:
        tokens.fill_(9)

    options["share"] = say_nine  # the first rank's tokens
    assert continue_greedily(model, prompts, stop_ids=[9], **options) == [[9]] * 3
