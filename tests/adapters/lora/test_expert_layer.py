"""LoRA on stacks of experts against the definition, and its start."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dist_peft.adapters.lora.expert_layer import LoraExperts
from dist_peft.adapters.low_rank.module import LowRankSpec
from dist_peft.core.span import Span
from dist_peft.model.expert_variants import ScaledInputExperts
from dist_peft.model.experts import ExpertStack, FrozenExperts
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout
from dist_peft.quant.codec import RawCodec
from dist_peft.quant.grouped_matmul import RowGroups

EXPERTS, OUT, IN, R = 4, 6, 8, 3
COUNTS = [2, 0, 5, 1]


@pytest.fixture
def layer() -> LoraExperts:
    torch.manual_seed(0)
    codec = RawCodec(torch.float32)
    stack = ExpertStack(EXPERTS, IN, OUT, codec, "stack", "cpu")
    stack.packed.data = codec.quantize_to_packed(torch.randn(EXPERTS * OUT, IN))
    spec = LowRankSpec(R, 0.5, torch.float32, seed=3)
    dropout = SampleDropout(0.4, "experts.down_proj", DropoutPosition(7))
    layer = LoraExperts(stack, "experts.down_proj", spec, dropout, "cpu")
    for parameter in (layer.lora_A, layer.lora_B):
        torch.nn.init.normal_(parameter)
    return layer


def by_definition(layer: LoraExperts, x: Tensor) -> Tensor:
    """``W_e + s B_e A_e`` of each expert; PEFT's reading of the two parameters."""
    A = layer.lora_A.view(EXPERTS, R, IN)
    B = layer.lora_B.view(OUT, R, EXPERTS)
    change = 0.5 * torch.einsum("ore,eri->eoi", B, A)
    weight = layer.base.dequantize_weight(torch.float32).view(EXPERTS, OUT, IN) + change
    return torch.cat([part @ w.T for part, w in zip(x.split(COUNTS), weight, strict=True)])


def test_equals_its_definition(layer: LoraExperts) -> None:
    layer.eval()  # without dropout
    results = []
    for forward in (
        lambda x: layer(x, RowGroups.from_counts(COUNTS)),
        lambda x: by_definition(layer, x),
    ):
        torch.manual_seed(1)
        x = torch.randn(sum(COUNTS), IN, requires_grad=True)
        layer.zero_grad()
        y = forward(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, layer.lora_A.grad.clone(), layer.lora_B.grad.clone()))
    torch.testing.assert_close(results[0], results[1])
    unused = results[0][2].view(EXPERTS, R, IN)[1]
    assert not unused.any() and not results[0][3].view(OUT, R, EXPERTS)[:, :, 1].any()


def test_dropout_is_that_of_the_tokens(layer: LoraExperts) -> None:
    """Each row's input of A is dropped as its token's would be before the router, the base's is
    not; in evaluation nothing is."""
    layer.dropout.position.begin_micro_batch(3, torch.tensor([5, 9]))
    torch.manual_seed(1)
    inputs = torch.randn(4, IN)
    tokens = torch.tensor([0, 3, 1, 2, 3, 0, 2, 1])
    groups = RowGroups.from_counts(COUNTS).with_tokens(tokens, 4)
    x = inputs[tokens]
    dropped = layer.dropout(inputs)[tokens]
    assert 0.1 < (dropped == 0).float().mean() < 0.8
    without = layer.base(x, groups)
    with torch.no_grad():
        wanted = by_definition(layer, dropped) - layer.base(dropped, groups) + without
        torch.testing.assert_close(layer(x, groups), wanted)
        layer.eval()
        torch.testing.assert_close(layer(x, groups), by_definition(layer, x))


class HostCopies(TorchDispatchMode):
    """Counts operators that wait for a device's numbers."""

    WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += func.name() in self.WAITING
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [FrozenExperts, ScaledInputExperts])
def test_a_layer_reads_one_list_on_the_host(
    kind: type[FrozenExperts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counts of rows by expert, for both products and their LoRA; backward reads nothing."""
    torch.manual_seed(0)
    codec, position = RawCodec(torch.float32), DropoutPosition(7)
    position.begin_micro_batch(0, torch.arange(1))
    stacks = {}
    for name, out, columns in (("gate_up_proj", 2 * OUT, IN), ("down_proj", IN, OUT)):
        stacks[name] = ExpertStack(EXPERTS, columns, out, codec, name, "cpu")
        rows = torch.randn(EXPERTS * out, columns)
        stacks[name].packed.data = codec.quantize_to_packed(rows)
    experts = kind(stacks, act_fn=torch.nn.SiLU())
    spec = LowRankSpec(R, 0.5, torch.float32, seed=3)
    for name, stack in stacks.items():
        layer = LoraExperts(stack, name, spec, SampleDropout(0.4, name, position), "cpu")
        for parameter in (layer.lora_A, layer.lora_B):
            torch.nn.init.normal_(parameter)
        experts.set_submodule(name, layer)
    x = torch.randn(6, IN)
    inputs: tuple[Tensor, ...] = (x, torch.randint(EXPERTS, (6, 2)), torch.rand(6, 2))
    if kind is ScaledInputExperts:
        inputs = ((torch.arange(EXPERTS * 6) % 3 == 1)[:, None] * x.repeat(EXPERTS, 1),)
    lists: list[Any] = []
    own = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: lists.append(own(self)) or lists[-1])
    with HostCopies() as copies:
        experts(*inputs).square().sum().backward()
    assert copies.count == 0 and len(lists) == 1
    assert len(lists[0]) == EXPERTS and sum(lists[0]) == (8 if len(inputs) == 1 else 12)


def test_starts_at_the_base(layer: LoraExperts) -> None:
    whole = Span(0, EXPERTS * R)
    A = layer.init_rows("lora_A", whole)
    assert A.shape == (EXPERTS * R, IN) and 0 < A.abs().max() <= IN**-0.5
    part = Span(2, 9)
    assert torch.equal(layer.init_rows("lora_A", part), A[part.slice])
    assert not layer.init_rows("lora_B", Span(0, OUT)).any()
