"""token_loss against F.cross_entropy, and how much memory it touches."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_peft.train import loss as module
from dist_peft.train.loss import sum_token_loss


def example(
    batch: int,
    length: int,
    vocabulary: int,
    dtype: torch.dtype,
    ignored: float = 0.4,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(batch, length, vocabulary, generator=g) * 4).to(dtype)
    labels = torch.randint(vocabulary, (batch, length), generator=g)
    labels[torch.rand(batch, length, generator=g) < ignored] = -100
    return logits, labels


def reference(logits: Tensor, labels: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = F.cross_entropy(leaf.float().flatten(0, 1), labels.flatten(), reduction="sum")
    (loss * scale).backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def ours(logits: Tensor, labels: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = sum_token_loss(leaf, labels)
    (loss * scale).backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1, 37 * 5, 2**24])
def test_equals_cross_entropy(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    logits, labels = example(3, 11, 37, dtype)
    loss, gradient = ours(logits, labels)
    wanted, wanted_gradient = reference(logits, labels)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    assert gradient.dtype == dtype
    # one rounding to the logits' type, and that may fall to the neighbour
    rtol = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(gradient, wanted_gradient, rtol=rtol, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 7), st.integers(1, 40), st.floats(0, 1), st.integers(0, 99)
)
def test_any_shape_and_any_share_of_targets(
    batch: int, length: int, vocabulary: int, ignored: float, seed: int
) -> None:
    logits, labels = example(batch, length, vocabulary, torch.float32, ignored, seed)
    loss, gradient = ours(logits, labels)
    wanted, wanted_gradient = reference(logits, labels)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_of_the_scalar_reaches_the_gradient(dtype: torch.dtype) -> None:
    logits, labels = example(2, 5, 17, dtype)
    _, gradient = ours(logits, labels, scale=1 / 3)
    _, wanted = reference(logits, labels, scale=1 / 3)
    rtol = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(gradient, wanted, rtol=rtol, atol=1e-6)


def test_no_target_gives_zero_and_a_zero_gradient() -> None:
    logits, labels = example(2, 4, 9, torch.bfloat16, ignored=1.1)
    logits[0, 0, 0] = float("inf")  # what is ignored must not leak, whatever it is
    loss, gradient = ours(logits, labels)
    assert loss.item() == 0
    assert torch.equal(gradient, torch.zeros_like(logits))


def test_ignored_positions_get_exactly_zero() -> None:
    logits, labels = example(2, 6, 9, torch.float32)
    _, gradient = ours(logits, labels)
    assert torch.equal(gradient[labels == -100], torch.zeros_like(gradient[labels == -100]))
    assert gradient[labels != -100].abs().sum(-1).min() > 0


@pytest.mark.parametrize("large", [80.0, 1e4])
def test_large_logits_do_not_overflow(large: float) -> None:
    logits = torch.tensor([[[large, -large, 0.0], [-large, large, large]]])
    labels = torch.tensor([[1, 1]])
    loss, gradient = ours(logits, labels)
    wanted, wanted_gradient = reference(logits, labels)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, wanted_gradient)


def test_not_finite_logits_are_not_hidden() -> None:
    logits, labels = example(1, 3, 5, torch.float32, ignored=0)
    logits[0, 1, 2] = float("nan")
    assert sum_token_loss(logits, labels).isnan()


def test_numerical_gradient() -> None:
    """Against central differences; float64 logits are differentiated in float64."""
    logits, labels = example(1, 4, 6, torch.float64)
    _, gradient = ours(logits, labels)
    numeric = torch.zeros_like(logits)
    for index in range(logits.numel()):
        for sign in (1, -1):
            moved = logits.clone()
            moved.view(-1)[index] += sign * 1e-5
            value = F.cross_entropy(moved[0], labels[0], reduction="sum")
            numeric.view(-1)[index] += sign * value / 2e-5
    torch.testing.assert_close(gradient, numeric, rtol=1e-6, atol=1e-8)


def test_strided_logits_are_taken_without_a_flat_copy() -> None:
    whole, labels = example(2, 8, 12, torch.float32)
    view = whole[:, 2:6].transpose(0, 1)
    loss, gradient = ours(view, labels[:, 2:6].T)
    wanted, wanted_gradient = reference(view.contiguous(), labels[:, 2:6].T.contiguous())
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-6, atol=1e-6)


def test_logits_are_left_as_they_were() -> None:
    logits, labels = example(2, 5, 7, torch.float32)
    before = logits.clone()
    ours(logits, labels)
    leaf = logits.requires_grad_()
    sum_token_loss(leaf, labels).backward()
    assert torch.equal(leaf.detach(), before)


def test_labels_must_fit() -> None:
    with pytest.raises(ValueError, match=r"labels \(2, 4\) do not fit logits \(2, 5, 7\)"):
        sum_token_loss(torch.zeros(2, 5, 7), torch.zeros(2, 4, dtype=torch.long))


class Spy(TorchDispatchMode):
    """Remembers the largest tensor of each dtype that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.largest[leaf.dtype] = max(self.largest.get(leaf.dtype, 0), leaf.numel())
        return result


def test_float32_never_exceeds_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward together: full size only in the logits' own dtype."""
    vocabulary, chunk = 500, 500 * 4
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    logits, labels = example(2, 64, vocabulary, torch.bfloat16, ignored=0.0)
    leaf = logits.requires_grad_()
    with Spy() as spy:
        sum_token_loss(leaf, labels).backward()
    assert leaf.grad is not None
    assert spy.largest[torch.float32] == chunk
    assert spy.largest[torch.bfloat16] == logits.numel()

    with Spy() as usual:  # the spy does see what the usual way allocates
        F.cross_entropy(leaf.float().flatten(0, 1), labels.flatten(), reduction="sum").backward()
    assert usual.largest[torch.float32] == logits.numel()


def test_nothing_but_logits_and_two_numbers_a_row_is_kept() -> None:
    logits, labels = example(2, 16, 50, torch.bfloat16)
    kept: list[Tensor] = []
    leaf = logits.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sum_token_loss(leaf, labels)
    targets = int((labels != -100).sum())
    assert [t.numel() for t in kept if t.is_floating_point()] == [logits.numel(), 2 * targets]
    assert kept[0].data_ptr() == leaf.data_ptr()


def test_no_grad_mode_keeps_nothing() -> None:
    logits, labels = example(2, 5, 7, torch.float32)
    with torch.no_grad():
        assert sum_token_loss(logits.requires_grad_(), labels).grad_fn is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_peak_memory() -> None:
    logits, labels = example(1, 2048, 64_000, torch.bfloat16, ignored=0.0)
    leaf, labels = logits.cuda().requires_grad_(), labels.cuda()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sum_token_loss(leaf, labels).backward()
    extra = torch.cuda.max_memory_allocated() - before
    gradient = logits.numel() * 2
    assert extra < gradient + 5 * module.CHUNK_ELEMENTS * 4
