"""What every engine asks of a model."""

import torch
from torch import nn

from dist_peft.core.trainable_steps import ALWAYS, TrainableSteps
from dist_peft.engine.engine_protocol import (
    build_lr_groups,
    init_adam_state,
    move_buffers_to_device,
    num_updates,
    trainable_parameters,
)
from dist_peft.model.parameter_readers import mark_readers


def test_buffers_without_data_are_zeros_in_towers_alone() -> None:
    """timm makes some with ``torch.empty``."""
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("tower", "text")})
    model.requires_grad_(False)
    for part in model.values():
        part.register_buffer("own", torch.ones(2))
        part.register_buffer("empty", torch.empty(2, device="meta"))
    mark_readers(model, {("tower", "weight"): ()})
    move_buffers_to_device(model, torch.device("cpu"))
    assert all(torch.equal(part.own, torch.ones(2)) for part in model.values())
    assert torch.equal(model["tower"].empty, torch.zeros(2))
    assert model["text"].empty.is_meta


def test_trainable_are_those_that_learn_in_the_models_order() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)))
    model[0].weight.requires_grad_(False)
    model[1][0].requires_grad_(False)
    found = trainable_parameters(model)
    assert list(found) == ["0.bias", "1.1.weight", "1.1.bias"]
    assert found["1.1.weight"] is model[1][1].weight


def test_a_shared_parameter_is_listed_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    assert list(trainable_parameters(model)) == ["0.weight"]


def test_groups_hold_parameters_of_one_learning_rate() -> None:
    parameters = {name: nn.Parameter(torch.zeros(1)) for name in ("a", "b", "c")}
    first, second = build_lr_groups(parameters, lambda name: 2.0 if name == "b" else 1.0)
    common = {"trainable_steps": ALWAYS}
    assert first == {"params": [parameters["a"], parameters["c"]], **common, "lr_scale": 1.0}
    assert second == {"params": [parameters["b"]], **common, "lr_scale": 2.0}


def test_groups_of_one_learning_rate_part_where_they_start() -> None:
    parameters = {name: nn.Parameter(torch.zeros(1)) for name in ("a", "b")}
    steps = {"a": ALWAYS, "b": TrainableSteps(((2, 4), (7, None)))}
    groups = build_lr_groups(parameters, lambda name: 1.0, steps.__getitem__)
    assert [group["trainable_steps"] for group in groups] == [steps["a"], steps["b"]]
    assert [num_updates(group, 9) for group in groups] == [9, 4]
    assert [num_updates(group, 3) for group in groups] == [3, 1]
    assert [num_updates(group, 9, skipped=(3, 5, 12)) for group in groups] == [7, 3]


def test_adam_starts_with_nothing() -> None:
    state = init_adam_state(nn.Parameter(torch.ones(2, 3)))
    assert state["step"] == 0 and not state["exp_avg"].requires_grad
    assert torch.equal(state["exp_avg"], torch.zeros(2, 3))
    assert torch.equal(state["exp_avg_sq"], torch.zeros(2, 3))


def test_buffers_move_and_parameters_stay() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2, device="cpu"), nn.Linear(2, 2))
    move_buffers_to_device(model, torch.device("meta"))
    assert all(buffer.is_meta for buffer in model.buffers())
    assert not any(parameter.is_meta for parameter in model.parameters())
