"""The schedule; ``tests/app/test_domain_adversarial.py`` has losses and gradients."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from dist_peft.adapters.classifier_head.discriminator import DomainDiscriminator
from dist_peft.core.config.run import DomainAdversarialConfig
from dist_peft.core.span import Span
from dist_peft.core.world import World
from dist_peft.data.classification import LabelledBatch
from dist_peft.data.labels import ClassTask
from dist_peft.train.domain_objective import (
    DomainObjective,
    compute_reversal_strength,
    find_discriminator,
)


def test_the_schedule_of_the_paper() -> None:
    config = DomainAdversarialConfig()
    assert compute_reversal_strength(config, 0, 10) == 0
    assert compute_reversal_strength(config, 5, 10) == pytest.approx(2 / (1 + math.exp(-5)) - 1)
    found = [compute_reversal_strength(config, step, 10) for step in range(11)]
    assert found == sorted(found) and 0.9999 < found[-1] < 1
    half = DomainAdversarialConfig(weight=0.5, gamma=3)
    assert compute_reversal_strength(half, 7, 7) == pytest.approx(0.5 * math.tanh(1.5))


def test_the_discriminator_of_a_model() -> None:
    made = DomainDiscriminator("a.discriminator", 2, 3, 2, seed=0)
    assert find_discriminator(nn.Sequential(nn.Linear(2, 2), nn.ModuleList([made]))) is made


class TinyDecoder(nn.Module):
    """Classifies the last token of a row; its discriminator sees the states of all."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(type_vocab_size=0)
        self.states, self.score = nn.Embedding(9, 4), nn.Linear(4, 2)
        self.discriminator = DomainDiscriminator("score.discriminator", 4, 3, 2, seed=0)
        for name, shape in self.discriminator.shapes.items():
            rows = self.discriminator.init_rows(name, Span(0, shape[0]))
            setattr(self.discriminator, name, nn.Parameter(rows))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool
    ) -> SimpleNamespace:
        states = self.states(input_ids)
        self.discriminator.logits = self.discriminator(states)
        last = attention_mask.sum(1) - 1
        return SimpleNamespace(logits=self.score(states[torch.arange(len(last)), last]))


def make_batch(lengths: list[int]) -> LabelledBatch:
    rows, width = len(lengths), max(lengths)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return LabelledBatch(
        input_ids=torch.arange(rows * width).view(rows, width) % 9,
        labels=torch.tensor([[n % 2] for n in range(rows)]),
        position_ids=torch.arange(width).expand(rows, width),
        sample_ids=torch.arange(rows),
        attention_mask=mask,
        token_types=torch.zeros_like(mask),
        ranges=torch.tensor([[0, 2]]).expand(rows, 2),
        domains=torch.tensor([n % 2 for n in range(rows)]),
    )


def test_a_shorter_batch_is_evaluated_after_training() -> None:
    """Places of last tokens are those of the batch that was trained on, and of no other."""
    model, cpu = TinyDecoder(), torch.device("cpu")
    task = ClassTask("pairs", ("no", "yes"), 0)
    objective = DomainObjective([task], DomainAdversarialConfig())
    long, short = make_batch([8, 5]), make_batch([3, 2])
    expected = objective.compute_row_statistics(model, short, cpu)
    objective.begin_step(0, [long], 2, World())
    objective.compute_loss(model, long, cpu, model).backward()
    assert model.discriminator.hidden_weight.grad is not None
    assert torch.equal(objective.compute_row_statistics(model, short, cpu), expected)
