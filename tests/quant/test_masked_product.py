"""The masked change against a dense one in float64, on every kind of packed rows."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dist_peft.core.config.run import QuantConfig
from dist_peft.quant import masked_product
from dist_peft.quant.codec import Codec, make_codec
from dist_peft.quant.masked_product import apply_masked_low_rank

OUT, IN, R, S = 24, 40, 3, 0.5
QUANTS = {
    "bf16": None,
    "nf4": QuantConfig(kind="nf4", group_size=8),
    "int4": QuantConfig(kind="int", group_size=8),
    "int2": QuantConfig(kind="int", bits=2, group_size=8),
}


def prune_to_2_4(weight: Tensor) -> Tensor:
    groups = weight.view(-1, 4)
    smallest = groups.abs().topk(2, largest=False).indices
    return groups.scatter(1, smallest, 0).view_as(weight)


@pytest.fixture(params=QUANTS)
def packed(request: pytest.FixtureRequest) -> tuple[Codec, Tensor, Tensor]:
    """Codec, packed rows of a 2:4 weight, and where the pruned weight is zero."""
    torch.manual_seed(0)
    weight = prune_to_2_4(torch.randn(OUT, IN))
    codec = make_codec(QUANTS[request.param], torch.bfloat16)
    return codec, codec.quantize_to_packed(weight), weight == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_native", [True, False])
def test_values_and_gradients(
    packed: tuple[Codec, Tensor, Tensor],
    dtype: torch.dtype,
    is_native: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codec, rows, _ = packed
    monkeypatch.setattr(masked_product, "_CHUNK_ELEMENTS", 5 * IN)  # the last chunk is shorter
    monkeypatch.setattr(masked_product, "has_fast_product", lambda *_: is_native)
    given = torch.randn(2, 7, IN).to(dtype), torch.randn(R, IN), torch.randn(OUT, R)
    x, A, B = (tensor.clone().requires_grad_() for tensor in given)
    y = checkpoint(apply_masked_low_rank, x, A, B, rows, codec, S, dtype, use_reentrant=False)
    exact = [tensor.double().requires_grad_() for tensor in given]
    mask = codec.dequantize_rows(rows, IN, torch.float32) != 0
    expected = exact[0] @ (mask * (S * (exact[2] @ exact[1]))).T
    assert y.dtype == dtype
    upstream = torch.randn_like(expected).to(dtype)
    y.backward(upstream)
    expected.backward(upstream.double())
    pairs = [
        (y, expected),
        *((own.grad, right.grad) for own, right in zip((x, A, B), exact, strict=True)),
    ]
    for found, right in pairs:
        assert found is not None and right is not None
        error = (found.double() - right).abs().max() / right.abs().max()
        assert error < (1e-5 if dtype == torch.float32 else 3e-2)


def test_pruned_weights_are_zero_in_every_kind_of_rows(
    packed: tuple[Codec, Tensor, Tensor],
) -> None:
    codec, rows, zeros = packed
    decoded = codec.dequantize_rows(rows, IN, torch.float32)
    assert (decoded[zeros] == 0).all()
    assert (decoded[~zeros] != 0).float().mean() > 0.6
    change = apply_masked_low_rank(
        torch.eye(IN), torch.randn(R, IN), torch.randn(OUT, R), rows, codec, S, torch.float32
    ).T
    assert torch.equal(change == 0, decoded == 0)


def test_gradients_that_are_not_due_and_freed_bytes() -> None:
    codec = make_codec(None, torch.float32)
    rows = codec.quantize_to_packed(torch.randn(OUT, IN))
    x, A, B = torch.randn(5, IN), torch.randn(R, IN), torch.randn(OUT, R, requires_grad=True)
    y = apply_masked_low_rank(x, A, B, rows, codec, S, torch.float32)
    y.sum().backward()
    assert B.grad is not None
    rows.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has no storage"):
        apply_masked_low_rank(x, A, B, rows, codec, S, torch.float32)
