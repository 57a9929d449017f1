"""DoRA layers that share a linear compute what each computes alone, by three decodes."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

from dist_peft.adapters.joined.row_shares import RowShares
from dist_peft.adapters.joined.weight_norms import JoinedWeightNorms
from dist_peft.adapters.lora.layer import LoraLinear, LoraSpec
from dist_peft.core.span import Span
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout
from tests.support.adapters import freeze, int_codec

IN, OUT, LENGTH = 32, 20, 3
SHARES = [(0, 2), (1, 1), (2, 3)]
"""Adapter 1 does not target the layer."""


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_rows_and_gradients_are_those_of_each_alone(p: float, has_bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, bias=has_bias)
    base, layers = freeze(linear, int_codec()), {}
    for number, r in {0: 2, 2: 5}.items():
        position = DropoutPosition(number)
        position.begin_micro_batch(1, torch.arange(dict(SHARES)[number]))
        spec = LoraSpec(r, 0.5 + number, torch.float32, number, dora=True)
        # one of them without dropout
        dropout = SampleDropout(p if number else 0.0, "q", position)
        layer = LoraLinear(base, "q", spec, dropout)
        layer.prepare_base_rows(linear.weight.detach(), Span(0, OUT), lambda t: t)
        for name, shape in layer.shapes.items():
            value = layer.init_rows(name, Span(0, shape[0]))
            setattr(layer, name, nn.Parameter(value + 0.1 * torch.rand(shape)))
        layers[number] = layer
    alone, shares = copy.deepcopy(layers), RowShares()
    joined = JoinedWeightNorms(base, "q", layers, shares)
    shares.split_batch(SHARES, LENGTH)
    x = torch.randn(6, LENGTH, IN, requires_grad=True)
    parts = x.split([count for _, count in SHARES])
    expected = torch.cat([alone[0](parts[0]), alone[2].base(parts[1]), alone[2](parts[2])])
    decode = type(base.codec).dequantize_rows
    with mock.patch.object(type(base.codec), "dequantize_rows", autospec=True) as counted:
        counted.side_effect = decode
        found = joined(x)
        torch.testing.assert_close(found, expected)
        own, wanted = (
            [q for layer in group for q in (layer.lora_A, layer.lora_B, layer.magnitude)]
            for group in (layers.values(), alone.values())
        )
        grads = torch.autograd.grad(found.square().sum(), [x, *own])
    assert counted.call_count == 3
    others = torch.autograd.grad(expected.square().sum(), [x, *wanted])
    for mine, other in zip(grads, others, strict=True):
        torch.testing.assert_close(mine, other)
