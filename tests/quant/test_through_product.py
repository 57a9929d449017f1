"""The straight-through product: gradients against those of a dense merged weight."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.codec import Codec
from dist_peft.quant.nf4 import Nf4Codec
from dist_peft.quant.through_product import ZeroFactors, multiply_through

CODECS: list[Codec] = [
    Nf4Codec(64, double_quant=False),
    AffineCodec(4, 32),
    AffineCodec(2, 16, "hqq"),
    AffineCodec(8, 64),
]
OUT, IN, RANK, SCALING = 37, 100, 5, 1.5


def make(codec: Codec, dtype: torch.dtype) -> tuple[Tensor, nn.Parameter, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    W = torch.randn(OUT, IN)
    A, B = torch.randn(RANK, IN).requires_grad_(), (torch.randn(OUT, RANK) * 0.1).requires_grad_()
    merged = (W + SCALING * B @ A).detach()
    packed = nn.Parameter(codec.quantize_to_packed(merged), requires_grad=False)
    return torch.randn(2, 3, IN).to(dtype).requires_grad_(), packed, W, A, B


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_are_those_of_a_dense_straight_through_weight(
    codec: Codec, dtype: torch.dtype
) -> None:
    x, packed, W, A, B = make(codec, dtype)
    y = multiply_through(x, packed, A, B, codec=codec, scaling=SCALING, dtype=dtype)
    Q = codec.dequantize_rows(packed, IN, dtype).clone()
    grad = torch.randn(2, 3, OUT, generator=torch.Generator().manual_seed(1)).to(dtype)
    y.backward(grad)
    dense_x = x.detach().clone().requires_grad_()
    dense_A, dense_B = (t.detach().double().requires_grad_() for t in (A, B))
    merged = W.double() + SCALING * dense_B @ dense_A
    # the value of Q with the gradient of W + s B A
    through = merged + (Q.double() - merged).detach()
    dense = functional.linear(dense_x.double(), through)
    dense.backward(grad.double())
    assert y.dtype == dtype and packed.grad is None
    assert all(t.grad is not None for t in (x, A, B)) and A.grad.dtype == torch.float32
    coarse = dtype == torch.bfloat16
    close = {"rtol": 2e-2, "atol": 0.3} if coarse else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y.double(), dense, **close)
    for found, wanted in ((x, dense_x), (A, dense_A), (B, dense_B)):
        torch.testing.assert_close(found.grad.double(), wanted.grad.double(), **close)


def test_forward_is_that_of_the_bytes_alone_and_survives_recomputation() -> None:
    codec = AffineCodec(4, 32)
    x, packed, _, A, B = make(codec, torch.float32)
    settings = {"codec": codec, "scaling": SCALING, "dtype": torch.float32}
    y = multiply_through(x, packed, A, B, **settings)
    assert torch.equal(y, functional.linear(x, codec.dequantize_rows(packed, IN, torch.float32)))
    y.sum().backward()
    grads = [t.grad.clone() for t in (x, A, B)]
    for tensor in (x, A, B):
        tensor.grad = None
    again = checkpoint(
        lambda t: multiply_through(t, packed, A, B, **settings), x, use_reentrant=False
    )
    again.sum().backward()
    assert all(torch.equal(t.grad, g) for t, g in zip((x, A, B), grads, strict=True))


def test_input_without_a_gradient_still_trains_the_factors() -> None:
    codec = Nf4Codec(64, double_quant=False)
    x, packed, _, A, B = make(codec, torch.float32)
    settings = {"codec": codec, "scaling": SCALING, "dtype": torch.float32}
    multiply_through(x.detach(), packed, A, B, **settings).sum().backward()
    assert A.grad is not None and B.grad is not None
    with pytest.raises(ValueError, match=r"\[\.\.\., 100\]"):
        multiply_through(x[..., :3], packed, A, B, **settings)


@pytest.mark.parametrize("size", [8, 32])  # 100 columns: the last group has fewer
def test_the_pair_of_the_zeros_has_the_gradients_of_a_dense_change_of_groups(size: int) -> None:
    codec = AffineCodec(2, size)
    x, packed, W, A, B = make(codec, torch.float64)
    groups = -(-IN // size)
    zero_A, zero_B = torch.randn(3, groups), torch.randn(OUT, 3)
    zeros = ZeroFactors(zero_A.requires_grad_(), zero_B.requires_grad_(), size)
    y = multiply_through(
        x, packed, A, B, codec=codec, scaling=SCALING, dtype=torch.float64, zeros=zeros
    )
    assert torch.equal(y, functional.linear(x, codec.dequantize_rows(packed, IN, torch.float64)))
    grad = torch.randn(2, 3, OUT, generator=torch.Generator().manual_seed(1)).double()
    y.backward(grad)
    dense_A, dense_B, wide_A, wide_B = (
        t.detach().double().requires_grad_() for t in (A, B, zero_A, zero_B)
    )
    change = (wide_B @ wide_A).repeat_interleave(size, 1)[:, :IN]
    merged = W.double() + SCALING * (dense_B @ dense_A + change)
    functional.linear(x.detach(), merged).backward(grad)
    for found, wanted in ((A, dense_A), (B, dense_B), (zero_A, wide_A), (zero_B, wide_B)):
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-5, atol=1e-5)
