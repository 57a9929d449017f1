"""AdamW of single roundings, against torch's and against itself cut into shards."""

import pytest
import torch
from torch import Tensor, nn

from dist_peft.core.config.run import TrainConfig
from dist_peft.train.exact_adamw import ExactAdamW
from dist_peft.train.optimizers import make_optimizer_factory

SIZE, STEPS = 1009, 3
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def values(seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)) * scale


def run(cut: int, kind: type = ExactAdamW, **changes: object) -> list[Tensor]:
    """Parameters and moments after three steps of a tensor that is cut into parts."""
    parts = [nn.Parameter(part.clone()) for part in values(0).split(cut)]
    optimizer = kind([{"params": parts}], **{**OPTIONS, **changes})
    if kind is ExactAdamW:
        for part in parts:
            optimizer.state[part] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(part),
                "exp_avg_sq": torch.zeros_like(part),
            }
    for step in range(STEPS):
        for part, grad in zip(parts, values(step + 1, 1e-3).split(cut), strict=True):
            part.grad = grad.clone()
        optimizer.step()
    states = [optimizer.state[part] for part in parts]
    return [
        torch.cat([part.detach() for part in parts]),
        *(torch.cat([s[key] for s in states]) for key in ("exp_avg", "exp_avg_sq")),
    ]


@pytest.mark.parametrize("cut", [1, 3, 7, 64])
def test_shards_have_the_same_bits(cut: int) -> None:
    expected = run(SIZE)
    assert all(torch.equal(a, b) for a, b in zip(run(cut), expected, strict=True))


def test_parameters_together_have_the_bits_of_each_alone() -> None:
    found = []
    for update in (ExactAdamW._update_alone, ExactAdamW._update_together):
        parts = list(values(0).split(400))
        optimizer = ExactAdamW([{"params": parts}], **OPTIONS)
        for part, grad in zip(parts, values(1).split(400), strict=True):
            part.grad = grad.clone()
            optimizer.state[part] = {"exp_avg": grad * 0.1, "exp_avg_sq": grad * grad}
        group = optimizer.param_groups[0]
        if update is ExactAdamW._update_alone:
            for part in parts:
                optimizer._update_alone(part, group, 3)
        else:
            optimizer._update_together(parts, group, 3)
        states = [optimizer.state[part].values() for part in parts]
        found.append([*parts, *(moment for state in states for moment in state)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_it_is_adamw() -> None:
    for found, expected in zip(run(SIZE), run(SIZE, torch.optim.AdamW), strict=True):
        near = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=near)
    undecayed = run(SIZE, torch.optim.AdamW, weight_decay=0.0)
    torch.testing.assert_close(run(SIZE, weight_decay=0.0)[0], undecayed[0], rtol=2e-6, atol=1e-6)


def test_parameters_without_a_gradient_keep_their_count() -> None:
    factory = make_optimizer_factory(TrainConfig(exact=True), torch.device("cpu"))
    assert factory.wants_plain
    one, other, none = (nn.Parameter(torch.ones(size)) for size in (3, 2, 0))
    optimizer = factory.build_optimizer([{"params": [one, other, none], "lr_scale": 1.0}])
    assert isinstance(optimizer, ExactAdamW)
    for number in range(2):
        one.grad = torch.ones(3)
        other.grad = torch.ones(2) if number else None
        none.grad = torch.ones(0)
        optimizer.step()
    assert optimizer.state[one]["step"] == 2 and optimizer.state[other]["step"] == 1
    moments = factory.read_moments(optimizer, other)
    assert torch.equal(moments["exp_avg"], torch.full((2,), 1.0) * (1 - 0.9))
