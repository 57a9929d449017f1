"""Float32 masters in place of a module's parameters."""

import torch
from torch import nn

from dist_peft.adapters.classifier_head.trained_module import TrainedModule


def test_masters_take_the_place_of_the_parameters_and_are_rounded_where_they_compute() -> None:
    base = nn.Linear(3, 2).bfloat16()
    base.checkpoint_names = {"weight": "score.weight"}  # type: ignore[assignment]
    part = TrainedModule(base, "score")
    assert part.checkpoint_names == {"weight": "score.weight"} and base.checkpoint_names == {}
    assert part.shapes == {"weight": (2, 3), "bias": (2,)}
    assert [n for n, _ in part.named_parameters()] == ["weight", "bias"]
    assert all(p.dtype == torch.float32 for p in part.parameters())
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.ones(1, 3, dtype=torch.bfloat16)
    y = part.compute_rounded(torch.bfloat16, x)
    weight, bias = part.weight.bfloat16(), part.bias.bfloat16()
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))
    y.float().sum().backward()
    assert part.weight.grad is not None and part.weight.grad.dtype == torch.float32
    assert torch.equal(part.weight.grad, torch.ones(2, 3))
