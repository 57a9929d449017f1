"""The schedule; ``tests/app/test_domain_adversarial.py`` has losses and gradients."""

import math

import pytest
from torch import nn

from dist_peft.adapters.classifier_head.discriminator import DomainDiscriminator
from dist_peft.core.config.run import DomainAdversarialConfig
from dist_peft.train.domain_objective import compute_reversal_strength, find_discriminator


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
