"""Experts trained through the quantizer: rows at any cut, gradients of each expert's factors."""

from functools import partial

import pytest
import torch
from torch import Tensor

from dist_peft.adapters.lora.merge import LoraMerger
from dist_peft.adapters.lora.tensors import LoraTensors
from dist_peft.adapters.lora.through_experts import ThroughExperts
from dist_peft.adapters.low_rank.module import LowRankSpec
from dist_peft.core.span import Span, row_span
from dist_peft.model.experts import ExpertStack
from dist_peft.model.frozen_linear import WeightRows
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout
from dist_peft.quant.codec import Codec
from dist_peft.quant.fp8 import Fp8Codec
from dist_peft.quant.grouped_matmul import RowGroups
from dist_peft.quant.kept_grid import count_changed_codes, quantize_on_grid
from dist_peft.quant.mxfp4 import Mxfp4Codec

CPU = torch.device("cpu")
EXPERTS, OUT, IN, RANK, SCALING = 3, 75, 64, 4, 2.0
ROWS = EXPERTS * OUT


def build_layer(codec: Codec) -> ThroughExperts:
    base = ExpertStack(EXPERTS, IN, OUT, codec, "m", "cpu")
    dropout = SampleDropout(0.0, "m", DropoutPosition(0))
    return ThroughExperts(base, "m", LowRankSpec(RANK, SCALING, torch.float32, 0), dropout, "cpu")


def draw_values() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(EXPERTS * RANK, IN, generator=generator)
    B = torch.randn(OUT, RANK * EXPERTS, generator=generator) * 0.1
    return torch.randn(ROWS, IN, generator=generator) * 0.25, A, B


def add_densely(rows: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Expert by expert in float64; column ``e`` of each ``EXPERTS`` of ``B`` is expert ``e``'s."""
    whole = rows.double().view(EXPERTS, OUT, IN).clone()
    for e in range(EXPERTS):
        whole[e] += SCALING * B[:, e::EXPERTS].double() @ A[e * RANK : (e + 1) * RANK].double()
    return whole.view(ROWS, IN).float()


@pytest.mark.parametrize("stored", [False, True], ids=["encoded", "packed in the files"])
@pytest.mark.parametrize("codec", [Mxfp4Codec(), Fp8Codec(32)], ids=str)
def test_bytes_do_not_depend_on_the_cut_and_are_those_of_a_merge(
    codec: Codec, stored: bool
) -> None:
    W, A, B = draw_values()
    base = codec.quantize_to_packed(W)

    def encode(parts: int, B: Tensor) -> Tensor:
        found = []
        for index in range(parts):
            layer, span = build_layer(codec), row_span(ROWS, parts, index)
            if stored:
                layer.base.stored = layer.base  # any reader of packed rows
                layer.keep_packed_rows(base[span.slice], span)
            layer.prepare_base_rows(W[span.slice], span, lambda t: t)
            found.append(layer.encode_own_rows(A, B, CPU, count=True))
            assert (layer.num_changed > 0) == (stored and bool(B.any()))
        return torch.cat(found)

    trained = encode(1, B)
    assert torch.equal(encode(2, B), trained) and torch.equal(encode(5, B), trained)
    assert torch.equal(encode(3, torch.zeros_like(B)), base)
    start = codec.dequantize_rows(base, IN, torch.float32) if stored else W
    dense = add_densely(start, A, B)
    grid = codec.grid_rows
    assert grid is not None
    slow = quantize_on_grid(dense, base, grid, IN) if stored else codec.quantize_to_packed(dense)
    assert count_changed_codes(slow, trained, grid, IN) < 2e-3 * ROWS * IN
    left = B.unflatten(1, (-1, EXPERTS)).permute(2, 0, 1).flatten(0, 1)
    factors = LoraTensors(A, left, SCALING, None, False, None, experts=EXPERTS)
    merger = LoraMerger({"m": factors}, None, {}, True)
    layer = build_layer(codec)
    layer.base.stored = layer.base if stored else None
    for span in Span(0, ROWS).split_into_chunks(50):
        read = WeightRows(layer.base, (base if stored else W)[span.slice])
        packed = read.to_packed(
            lambda rows, span=span: merger.compute_encoded_rows("m.weight", rows, span)
        )
        assert torch.equal(packed, trained[span.slice])


def test_the_product_is_that_of_the_bytes_and_gradients_go_straight_through() -> None:
    codec, (W, A, B) = Mxfp4Codec(), draw_values()
    layer = build_layer(codec)
    layer.prepare_base_rows(W, Span(0, ROWS), lambda t: t)
    layer.base.packed.data = layer.encode_own_rows(A, B, CPU)
    layer.lora_A.data, layer.lora_B.data = A, B
    groups = RowGroups.from_counts([3, 0, 5])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, IN, generator=generator).requires_grad_()
    y = layer(x, groups)
    dense = codec.dequantize_rows(layer.base.packed, IN, torch.float32).view(EXPERTS, OUT, IN)
    experts = [0] * 3 + [2] * 5
    assert torch.equal(y, layer.base(x, groups))
    wanted = torch.stack([dense[e] @ row for e, row in zip(experts, x, strict=True)])
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(y, wanted)
    grad = torch.randn(8, OUT, generator=generator)
    y.backward(grad)
    dx = torch.stack([g @ dense[e] for e, g in zip(experts, grad, strict=True)])
    close(x.grad, dx)
    dA, dB = torch.zeros_like(A), torch.zeros_like(B)
    for e, row, g in zip(experts, x.detach(), grad, strict=True):
        own = slice(e * RANK, (e + 1) * RANK)
        dB[:, e::EXPERTS] += SCALING * torch.outer(g, A[own] @ row)
        dA[own] += SCALING * torch.outer(B[:, e::EXPERTS].T @ g, row)
    close(layer.lora_A.grad, dA)
    close(layer.lora_B.grad, dB)


def test_the_first_steps_can_be_plain() -> None:
    codec, (W, A, B) = Mxfp4Codec(), draw_values()
    layer = build_layer(codec)
    layer.base.packed.data = codec.quantize_to_packed(W)
    layer.lora_A.data, layer.lora_B.data = A, B
    layer.set_start("lora")
    x, groups = torch.randn(4, IN), RowGroups.from_counts([2, 1, 1])
    change = layer(x, groups) - layer.base(x, groups)
    assert float(change.detach().abs().max()) > 0.1
    assert not layer.keeps_base and layer.joined_form is None
