"""IA3 layers that share a linear compute what each computes alone."""

import copy

import pytest
import torch
from torch import nn

from dist_peft.adapters.ia3.layer import Ia3Linear
from dist_peft.adapters.joined.rescaling import JoinedRescaling
from dist_peft.adapters.joined.row_shares import RowShares
from tests.support.adapters import freeze, int_codec

IN, OUT, LENGTH = 32, 20, 3
SHARES = [(0, 2), (1, 1), (2, 3)]
"""Adapter 1 does not target the layer."""


@pytest.mark.parametrize("rescales_input", [False, True])
def test_rows_and_gradients_are_those_of_each_alone(rescales_input: bool) -> None:
    torch.manual_seed(0)
    base = freeze(nn.Linear(IN, OUT), int_codec())
    layers = {k: Ia3Linear(base, "q", rescales_input=rescales_input) for k in (0, 2)}
    for layer in layers.values():
        layer.ia3_l = nn.Parameter(torch.rand(IN if rescales_input else OUT) + 0.5)
    alone, shares = copy.deepcopy(layers), RowShares()
    joined = JoinedRescaling(base, "q", layers, shares)
    shares.split_batch(SHARES, LENGTH)
    x = torch.randn(6, LENGTH, IN, requires_grad=True)
    parts = x.split([count for _, count in SHARES])
    expected = torch.cat([alone[0](parts[0]), alone[2].base(parts[1]), alone[2](parts[2])])
    found = joined(x)
    torch.testing.assert_close(found, expected)
    own, wanted = ([layer.ia3_l for layer in group.values()] for group in (layers, alone))
    grads = torch.autograd.grad(found.square().sum(), [x, *own])
    others = torch.autograd.grad(expected.square().sum(), [x, *wanted])
    for mine, other in zip(grads, others, strict=True):
        torch.testing.assert_close(mine, other)
