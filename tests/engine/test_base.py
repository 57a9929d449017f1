"""What every engine asks of a model."""

from torch import nn

from dist_peft.engine.base import trainable


def test_trainable_are_those_that_learn_in_the_models_order() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)))
    model[0].weight.requires_grad_(False)
    model[1][0].requires_grad_(False)
    found = trainable(model)
    assert list(found) == ["0.bias", "1.1.weight", "1.1.bias"]
    assert found["1.1.weight"] is model[1][1].weight


def test_a_shared_parameter_is_listed_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    assert list(trainable(model)) == ["0.weight"]
