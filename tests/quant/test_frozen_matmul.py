"""The product with a packed weight: gradients, and what it keeps in memory."""

import gc
import weakref
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dist_peft.quant import cpu_products
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.codec import Codec, RawCodec
from dist_peft.quant.cpu_products import has_fast_product
from dist_peft.quant.frozen_matmul import frozen_matmul
from dist_peft.quant.nf4 import Nf4Codec

CODECS: list[Codec] = [
    Nf4Codec(),
    Nf4Codec(24),
    AffineCodec(4, 32),
    AffineCodec(3, 64),
    RawCodec(torch.float32),
    RawCodec(torch.bfloat16),
]
OUT, IN = 37, 100


def make(codec: Codec, dtype: torch.dtype, *lead: int) -> tuple[nn.Parameter, Tensor, Tensor]:
    """A packed parameter, its dense weight, and an input ``[*lead, IN]``, both in ``dtype``."""
    torch.manual_seed(0)
    packed = nn.Parameter(codec.quantize_to_packed(torch.randn(OUT, IN)), requires_grad=False)
    weight = codec.dequantize_rows(packed, IN, dtype).clone()
    return packed, weight, torch.randn(*lead, IN).to(dtype).requires_grad_()


def dense_linear(x: Tensor, weight: Tensor) -> Tensor:
    """16-bit types as on processors without products for them: computed in float32, rounded once,
    in both directions."""
    if has_fast_product(x.device, x.dtype):
        return functional.linear(x, weight)
    return functional.linear(x.float(), weight.float()).to(x.dtype)


@pytest.fixture(autouse=True, params=[False, True], ids=["float32 products", "native products"])
def native_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether 16-bit products are computed as such, whatever processor this is."""
    monkeypatch.setattr(cpu_products, "_is_native_product_fast", lambda dtype: request.param)
    return bool(request.param)


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 4)])
def test_equals_a_dense_linear(codec: Codec, dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    packed, weight, x = make(codec, dtype, *lead)
    dense_x = x.detach().clone().requires_grad_()
    y, dense_y = frozen_matmul(x, packed, codec, IN), dense_linear(dense_x, weight)
    assert y.dtype == dtype
    assert torch.equal(y, dense_y)
    grad = torch.randn_like(y)
    y.backward(grad)
    dense_y.backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, dense_x.grad)
    assert packed.grad is None


def test_equals_a_dense_linear_for_large_batches() -> None:
    codec = Nf4Codec()
    torch.manual_seed(0)
    packed = codec.quantize_to_packed(torch.randn(256, 512))
    weight = codec.dequantize_rows(packed, 512, torch.bfloat16)
    x = torch.randn(4, 64, 512, dtype=torch.bfloat16, requires_grad=True)
    dense_x = x.detach().clone().requires_grad_()
    frozen_matmul(x, packed, codec, 512).square().sum().backward()
    dense_linear(dense_x, weight).square().sum().backward()
    assert torch.equal(x.grad, dense_x.grad)


# -- memory -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spy:
    """A codec that remembers, weakly, each weight it has decoded."""

    inner: Codec
    decoded: list["weakref.ref[Tensor]"] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.inner.name

    def num_row_bytes(self, in_features: int) -> int:
        return self.inner.num_row_bytes(in_features)

    def quantize_to_packed(self, weight: Tensor) -> Tensor:
        return self.inner.quantize_to_packed(weight)

    def dequantize_rows(self, packed: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
        weight = self.inner.dequantize_rows(packed, in_features, dtype)
        self.decoded.append(weakref.ref(weight))
        return weight


def dense_weights_alive() -> int:
    """Float tensors of the weight's shape that the collector can see."""
    gc.collect()
    return sum(
        issubclass(type(o), Tensor) and o.is_floating_point() and set(o.shape) == {OUT, IN}
        for o in gc.get_objects()
    )


def test_no_decoded_weight_waits_for_backward() -> None:
    codec = Spy(Nf4Codec())
    packed, weight, x = make(codec, torch.float32, 4)
    del weight
    saved: list[Tensor] = []

    def remember(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    before = dense_weights_alive()
    codec.decoded.clear()
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        y = frozen_matmul(x, packed, codec, IN)
    assert saved == []
    assert dense_weights_alive() == before
    assert [ref() for ref in codec.decoded] == [None]
    y.sum().backward()
    assert [ref() for ref in codec.decoded] == [None, None], "backward decodes once more"
    assert dense_weights_alive() == before


def test_keeps_the_packed_object_itself() -> None:
    packed, _, x = make(Nf4Codec(), torch.float32, 4)
    y = frozen_matmul(x, packed, Nf4Codec(), IN)
    assert y.grad_fn is not None
    assert y.grad_fn.packed is packed  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["no_grad", "inference", "frozen input"])
def test_keeps_nothing_where_no_gradient_is_due(mode: str) -> None:
    codec = Nf4Codec()
    packed, weight, x = make(codec, torch.float32, 4)
    alive = weakref.ref(packed)
    guards = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
    with guards.get(mode, torch.enable_grad)():
        y = frozen_matmul(x.detach() if mode == "frozen input" else x, packed, codec, IN)
    assert torch.equal(y, functional.linear(x, weight))
    assert y.grad_fn is None
    del packed
    assert alive() is None


# -- storage that comes and goes --------------------------------------------------------------


def release(packed: Tensor) -> Tensor:
    """Free the bytes as FSDP2 does; gives a copy to refill from."""
    copy = packed.detach().clone()
    packed.untyped_storage().resize_(0)
    return copy


def refill(packed: Tensor, copy: Tensor) -> None:
    packed.untyped_storage().resize_(copy.nbytes)
    with torch.no_grad():
        packed.copy_(copy)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_storage_may_be_freed_between_forward_and_backward(codec: Codec) -> None:
    packed, weight, x = make(codec, torch.float32, 4)
    y = frozen_matmul(x, packed, codec, IN)
    copy = release(packed)
    refill(packed, copy)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(4, OUT) @ weight)


def test_backward_uses_the_bytes_of_that_moment() -> None:
    codec = Nf4Codec()
    packed, _, x = make(codec, torch.float32, 4)
    y = frozen_matmul(x, packed, codec, IN)
    other = codec.quantize_to_packed(torch.randn(OUT, IN))
    packed.data = other  # ZeRO-3 exchanges the data
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(4, OUT) @ codec.dequantize_rows(other, IN, torch.float32))


def test_freed_storage_is_an_error_not_a_crash() -> None:
    codec = Nf4Codec()
    packed, _, x = make(codec, torch.float32, 4)
    y = frozen_matmul(x, packed, codec, IN)
    release(packed)
    with pytest.raises(RuntimeError, match="has no storage"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="has no storage"):
        frozen_matmul(x, packed, codec, IN)


def test_works_inside_activation_checkpointing() -> None:
    codec = Nf4Codec()
    packed, weight, x = make(codec, torch.float32, 4)
    square = nn.Parameter(codec.quantize_to_packed(torch.randn(IN, OUT)), requires_grad=False)
    dense_square = codec.dequantize_rows(square, OUT, torch.float32)

    def block(h: Tensor) -> Tensor:
        h = torch.tanh(frozen_matmul(h, packed, codec, IN))
        return torch.tanh(frozen_matmul(h, square, codec, OUT))

    y = checkpoint(block, x, use_reentrant=False)
    copies = [release(p) for p in (packed, square)]
    for parameter, copy in zip((packed, square), copies, strict=True):
        refill(parameter, copy)
    y.square().sum().backward()

    dense_x = x.detach().clone().requires_grad_()
    hidden = torch.tanh(functional.linear(dense_x, weight))
    torch.tanh(functional.linear(hidden, dense_square)).square().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, dense_x.grad)


# -- errors -----------------------------------------------------------------------------------


def test_shapes_and_types_are_checked() -> None:
    codec = Nf4Codec()
    packed, _, x = make(codec, torch.float32, 4)
    with pytest.raises(ValueError, match=r"x is floating point \[..., 100\], not .* \[4, 99\]"):
        frozen_matmul(x[:, :99], packed, codec, IN)
    with pytest.raises(ValueError, match=r"torch.int64 \[4, 100\]"):
        frozen_matmul(x.long(), packed, codec, IN)
    with pytest.raises(ValueError, match="x is floating point"):
        frozen_matmul(torch.tensor(1.0), packed, codec, IN)
    with pytest.raises(ValueError, match="rows of codec nf4 with in_features=100 are uint8"):
        frozen_matmul(x, packed[:, :-4], codec, IN)


def test_second_derivatives_are_refused() -> None:
    codec = Nf4Codec()
    packed, _, x = make(codec, torch.float32, 4)
    y = frozen_matmul(x, packed, codec, IN).square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
