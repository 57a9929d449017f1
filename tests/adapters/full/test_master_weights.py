from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_peft.adapters.full.master_weights import (
    MasterWeightLinear,
    StepCounter,
    TrainableSpec,
    use_master_weights,
)
from dist_peft.core.trainable_steps import ALWAYS, TrainableSteps

BF16 = torch.bfloat16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(
    arithmetic: torch.dtype, steps: dict[str, TrainableSteps] | None = None
) -> MasterWeightLinear:
    steps = {"weight": ALWAYS, "bias": ALWAYS} if steps is None else steps
    weight, bias = nn.Parameter(random(5, 4)), nn.Parameter(random(5, seed=1))
    return MasterWeightLinear(weight, bias, TrainableSpec(steps, arithmetic), {})


@pytest.mark.parametrize("turned", [False, True])
def test_linear_computes_with_the_rounded_copy(turned: bool) -> None:
    """In bfloat16, with float32 gradients, as a plain linear of the rounded weights; or with the
    weight transposed."""
    module, x = linear(BF16), random(2, 3, 4, seed=2).to(BF16).requires_grad_()
    straight = module
    if turned:
        weight = nn.Parameter(straight.weight.data.T.contiguous())
        module = MasterWeightLinear(weight, straight.bias, straight.learning, {}, True)
        assert (module.out_features, module.in_features) == (5, 4)
    y = module(x)
    assert y.dtype == BF16
    assert module.bias is not None
    plain = nn.Linear(4, 5)
    plain.weight.data = straight.weight.data.to(BF16).float()
    plain.bias.data = module.bias.data.to(BF16).float()
    x32 = x.detach().float().requires_grad_()
    expected = plain(x32)
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)
    grad = random(*y.shape, seed=3).to(BF16)
    y.backward(grad)
    expected.backward(grad.float())
    assert x.grad is not None and x32.grad is not None
    torch.testing.assert_close(x.grad.float(), x32.grad, rtol=1e-2, atol=1e-2)
    for mine, its in zip(module.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None and mine.grad.dtype == torch.float32
        grad = mine.grad.T if turned and mine is module.weight else mine.grad
        torch.testing.assert_close(grad, its.grad, rtol=1e-2, atol=2e-2)


def test_linear_waits_with_the_master_and_not_with_a_copy() -> None:
    """Engines free and refill the parameter between forward and backward."""
    module, x = linear(BF16), random(3, 4, seed=2).to(BF16).requires_grad_()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    assert not any(tuple(tensor.shape) == (5, 4) for tensor in saved)
    refilled = random(5, 4, seed=9)
    module.weight.data.copy_(refilled)
    y.backward(torch.ones_like(y))
    expected = torch.ones(3, 5) @ refilled.to(BF16).float()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.float(), expected, rtol=1e-2, atol=1e-2)


def test_before_its_stage_nothing_has_a_gradient() -> None:
    clock = StepCounter()
    weight, bias = nn.Parameter(random(5, 4)), nn.Parameter(random(5))
    learning = TrainableSpec(
        {"weight": TrainableSteps(((2, None),)), "bias": ALWAYS}, torch.float32, clock
    )
    module = MasterWeightLinear(weight, bias, learning, {})
    for step, has in ((0, False), (1, False), (2, True)):
        clock.step, weight.grad, bias.grad = step, None, None
        module(random(3, 4)).sum().backward()
        assert bias.grad is not None and (weight.grad is not None) == has


MODULES: list[tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = [
    (lambda: nn.LayerNorm(4), lambda: random(3, 4, seed=2)),
    (lambda: nn.Embedding(7, 4), lambda: torch.tensor([[1, 2, 2], [6, 0, 1]])),
]


@pytest.mark.parametrize(("make", "given"), MODULES, ids=["norm", "embedding"])
def test_module_computes_in_its_type(
    make: Callable[[], nn.Module], given: Callable[[], Tensor]
) -> None:
    x = given()
    x = x.to(BF16) if x.is_floating_point() else x
    module = make().to(BF16)
    kind = type(module)
    masters = {n: nn.Parameter(random(*p.shape)) for n, p in module.named_parameters()}
    use_master_weights(module, masters, TrainableSpec(dict.fromkeys(masters, ALWAYS), BF16))
    assert isinstance(module, kind) and dict(module.named_parameters()) == masters
    plain = make().to(BF16)
    plain.load_state_dict({n: p.detach().to(BF16) for n, p in masters.items()})
    y = module(x)
    assert torch.equal(y, plain(x)) and y.dtype == BF16
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in masters.values())


def test_gradients_of_looked_up_rows_add_up_in_float32() -> None:
    """257 ones: bfloat16 has no 257."""
    module = nn.Embedding(3, 2, dtype=BF16)
    master = nn.Parameter(random(3, 2))
    use_master_weights(module, {"weight": master}, TrainableSpec({"weight": ALWAYS}, BF16))
    module(torch.ones(257, dtype=torch.long)).sum().backward()
    assert master.grad is not None and torch.equal(master.grad[1], torch.full((2,), 257.0))


def test_float32_arithmetic_on_a_bfloat16_base() -> None:
    """``train.precision: fp32``: nothing is rounded but what comes out."""
    module: Any = nn.LayerNorm(4, dtype=BF16)
    masters = {"weight": nn.Parameter(random(4)), "bias": nn.Parameter(random(4, seed=1))}
    use_master_weights(
        module, masters, TrainableSpec({"weight": ALWAYS, "bias": ALWAYS}, torch.float32)
    )
    x = random(3, 4, seed=2).to(BF16)
    exact = nn.functional.layer_norm(x.float(), (4,), masters["weight"], masters["bias"])
    assert torch.equal(module(x), exact.to(BF16))


def test_a_frozen_neighbour_stays_frozen() -> None:
    module = nn.LayerNorm(4, dtype=BF16).requires_grad_(False)
    use_master_weights(
        module, {"bias": nn.Parameter(random(4))}, TrainableSpec({"bias": ALWAYS}, BF16)
    )
    module(random(3, 4).to(BF16)).sum().backward()
    assert module.weight.dtype == BF16 and module.weight.grad is None
    assert module.bias.grad is not None
