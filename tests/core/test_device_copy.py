"""Copies to a device: plain on a CPU, pinned and queued for a GPU."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from dist_peft.core.device_copy import copy_to_device


class HostTensor:
    """Notes what a tensor is asked for."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def pin_memory(self) -> "HostTensor":
        self.calls.append("pin")
        return self

    def to(self, device: torch.device, non_blocking: bool = False) -> "HostTensor":
        self.calls.append((device.type, non_blocking))
        return self


@pytest.mark.parametrize(
    ("device", "calls"), [("cuda", ["pin", ("cuda", True)]), ("cpu", [("cpu", False)])]
)
def test_pinned_and_queued_for_a_gpu_alone(device: str, calls: list[Any]) -> None:
    tensor = HostTensor()
    copy_to_device(cast(Tensor, tensor), torch.device(device))
    assert tensor.calls == calls


def test_a_tensor_of_the_device_stays() -> None:
    ids = torch.arange(4)
    assert copy_to_device(ids, torch.device("cpu")) is ids


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_many_batches_arrive_whole() -> None:
    device = torch.device("cuda", 0)
    batches = [torch.full((2, 4096), number) for number in range(64)]
    found = [copy_to_device(batch, device) for batch in batches]
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, batches, strict=True))
