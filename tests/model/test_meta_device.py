from unittest import mock

import pytest
import torch
from torch import nn

from dist_peft.model.meta_device import EmptyOnMeta


def test_weights_have_no_memory_and_are_not_drawn() -> None:
    with EmptyOnMeta(), mock.patch("torch._refs.normal", side_effect=AssertionError("drawn")):
        module = nn.Sequential(nn.Linear(3, 5), nn.Embedding(7, 3))
        for drawn in (nn.init.normal_(module[0].weight), module[1].weight.data.normal_(std=2.0)):
            assert drawn.is_meta
    assert [(p.device.type, tuple(p.shape)) for p in module.parameters()] == [
        ("meta", (5, 3)),
        ("meta", (5,)),
        ("meta", (7, 3)),
    ]


@pytest.mark.parametrize("name", ["normal_", "uniform_", "kaiming_uniform_"])
def test_tensors_with_memory_are_drawn(name: str) -> None:
    """Buffers with values are computed on the CPU as everywhere."""
    found = []
    for mode in (EmptyOnMeta(), torch.no_grad()):
        torch.manual_seed(3)
        with mode:
            found.append(getattr(nn.init, name)(torch.zeros(4, 6)))
    assert found[0].any() and torch.equal(*found)
    with EmptyOnMeta():
        assert torch.arange(3).tolist() == [0, 1, 2]
        assert torch.empty(2, device="cpu").uniform_(1, 2).min() >= 1


def test_stacks_of_zeros_are_weights() -> None:
    with EmptyOnMeta():
        assert torch.zeros(64, 128, 128).is_meta and torch.zeros((64, 128, 128)).is_meta
        small = torch.zeros(2, 3, 4), torch.zeros(2**20), torch.zeros(64, 128, 128, device="cpu")
        assert not any(tensor.is_meta for tensor in small)
