"""Frozen models on fake tensors: shapes, ties and the log of PyTorch."""

import logging

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dist_peft.model.fake_tensors import (
    fake_frozen_forwards,
    quiet_fake_tensors,
    replace_with_fake_tensors,
)
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.quant.codec import RawCodec


def test_tied_parameters_stay_tied_and_buffers_are_faked() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    mode = FakeTensorMode()
    parameters = replace_with_fake_tensors(model, mode)
    assert len(parameters) == 4
    assert model[1].weight is model[0].weight
    assert all(isinstance(t, FakeTensor) and t.device.type == "cpu" for t in parameters)
    assert all(isinstance(b, FakeTensor) for b in model.buffers())


def test_a_packed_linear_has_a_shape_and_a_number() -> None:
    codec = RawCodec(torch.float32)
    linear = FrozenLinear(
        4, 6, codec, bias=False, bias_dtype=torch.float32, source="", device="meta"
    )
    mode, markers = FakeTensorMode(allow_non_fake_inputs=True), dict[nn.Module, torch.Tensor]()
    fake_frozen_forwards(linear, mode, markers)
    with mode:
        y = linear(torch.ones(2, 3, 4))
        assert y.shape == (2, 3, 6)
        y.sum().backward()
        with pytest.raises(ValueError, match="a linear of 4 columns gets"):
            linear(torch.ones(2, 3))
    assert markers[linear].grad is not None


def test_operators_that_fail_print_nothing(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("torch._subclasses.fake_tensor")
    with caplog.at_level(logging.ERROR):
        with quiet_fake_tensors():
            log.error("failed while attempting to run meta")
        assert caplog.text == ""
        log.error("again")
    assert "again" in caplog.text
