import pytest
import torch
from torch import nn

from dist_peft.model.parameter_override import override_parameters


def test_stand_ins_compute_and_go() -> None:
    linear = nn.Linear(2, 2, bias=False)
    registered, x = linear.weight, torch.ones(1, 2)
    other = torch.full((2, 2), 3.0)
    with override_parameters(linear, {"weight": other}):
        assert torch.equal(linear(x), torch.full((1, 2), 6.0))
        assert linear._parameters["weight"] is registered
    assert linear.weight is registered


def test_what_an_engine_put_there_comes_back_after_an_error() -> None:
    linear = nn.Linear(2, 2, bias=False)
    hidden = linear._parameters.pop("weight")
    linear.__dict__["weight"] = hidden
    with (
        pytest.raises(ZeroDivisionError),
        override_parameters(linear, {"weight": torch.ones(2, 2)}),
    ):
        raise ZeroDivisionError
    assert linear.weight is hidden
