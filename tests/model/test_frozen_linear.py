from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.frozen_linear import FrozenLinear, WeightRows, all_rows_finite
from dist_peft.quant.codec import Codec, make_codec
from dist_peft.quant.kept_grid import quantize_on_grid
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader
from tests.support import packed

CODECS = {
    "raw": make_codec(None, torch.float32),
    "int4": make_codec(QuantConfig(kind="int", bits=4, group_size=16), torch.float32),
    "nf4": make_codec(QuantConfig(), torch.float32),
}


def linear(codec: Codec, bias: bool, bias_dtype: torch.dtype = torch.float32) -> FrozenLinear:
    generator = torch.Generator().manual_seed(0)
    layer = FrozenLinear(
        48, 20, codec, bias=bias, bias_dtype=bias_dtype, source="a.weight", device="cpu"
    )
    layer.packed.data = codec.quantize_to_packed(torch.randn(20, 48, generator=generator))
    if layer.bias is not None:
        layer.bias.data = torch.randn(20, generator=generator).to(bias_dtype)
    return layer


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).requires_grad_()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_equals_a_dense_linear(codec: Codec, bias: bool) -> None:
    layer, x = linear(codec, bias), inputs()
    weight = layer.dequantize_weight(torch.float32)
    assert weight.shape == (20, 48)
    y = layer(x)
    y.square().sum().backward()
    reference = inputs()
    expected = F.linear(reference, weight, layer.bias)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, reference.grad)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_output_has_the_type_of_the_input(bias_dtype: torch.dtype) -> None:
    layer = linear(CODECS["int4"], True, bias_dtype)
    assert layer(inputs(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [False, True])
def test_everything_is_a_frozen_parameter(bias: bool) -> None:
    layer = linear(CODECS["int4"], bias)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    packed = (20, CODECS["int4"].num_row_bytes(48))
    assert shapes == ({"packed": packed, "bias": (20,)} if bias else {"packed": packed})
    assert not any(p.requires_grad for p in layer.parameters())
    assert layer.packed.dtype == torch.uint8
    assert not list(layer.buffers())


def test_is_built_on_meta() -> None:
    layer = FrozenLinear(
        1024,
        4096,
        CODECS["nf4"],
        bias=True,
        bias_dtype=torch.bfloat16,
        source="model.q.weight",
        device="meta",
    )
    assert all(p.is_meta for p in layer.parameters())
    assert layer.source == "model.q.weight"
    assert not layer.is_head
    assert "in_features=1024, out_features=4096, codec=nf4, bias=True" in repr(layer)


def test_reads_the_parameter_as_it_is_then() -> None:
    """Engines free and refill storage between forward and backward."""
    layer, x = linear(CODECS["int4"], False), inputs()
    loss = layer(x).sum()
    layer.packed.data.copy_(CODECS["int4"].quantize_to_packed(torch.ones(20, 48)))
    loss.backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 20.0), rtol=1e-3, atol=0)


class Given:
    """Packed rows that are there already, as in a prequantized base."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def read_packed_rows(self, reader: RowReader, span: Span) -> Tensor:
        return self.rows[span.slice]


@pytest.fixture
def reader(tmp_path: Path) -> RowReader:
    weight = torch.randn(20, 48, generator=torch.Generator().manual_seed(2))
    weight[19, 1] = torch.nan
    packed.save({"a.weight": weight}, tmp_path)
    return RowReader(SafetensorsIndex.open(tmp_path))


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_rows_that_are_encoded(codec: Codec, reader: RowReader) -> None:
    weight, span = reader.read_rows("a.weight"), Span(3, 9)
    rows = WeightRows.read_weight_rows(linear(codec, False), reader, span)
    assert torch.equal(rows.to_float(), weight[3:9])
    assert torch.equal(rows.to_packed(), codec.quantize_to_packed(weight[3:9]))
    assert torch.equal(
        rows.to_packed(lambda found: 2 * found), codec.quantize_to_packed(2 * weight[3:9])
    )
    with pytest.raises(UserError, match=r"a\.weight: weight is not finite"):
        WeightRows.read_weight_rows(linear(codec, False), reader, Span(10, 20))


def test_rows_that_are_packed_already(reader: RowReader) -> None:
    codec, seen = CODECS["int4"], list[Tensor]()
    own, layer = codec.quantize_to_packed(torch.randn(20, 48)), linear(CODECS["int4"], False)
    layer.stored = Given(own)
    rows = WeightRows.read_weight_rows(layer, reader, Span(3, 9))
    assert torch.equal(rows.to_float(), codec.dequantize_rows(own, 48, torch.float32)[3:9])

    def look(found: Tensor) -> Tensor:
        seen.append(found)
        return found

    assert torch.equal(rows.to_packed(), own[3:9]) and torch.equal(rows.to_packed(look), own[3:9])
    assert torch.equal(seen[0], rows.to_float())
    # others are put into the codes of the same scales and zeros
    grid = quantize_on_grid(2 * rows.to_float(), own[3:9], codec, 48)
    assert torch.equal(rows.to_packed(lambda found: 2 * found), grid)


def test_rounded() -> None:
    rows, layer = torch.randn(4, 48), linear(CODECS["int4"], False)
    codec = layer.codec
    assert torch.equal(
        layer.fake_quantize(rows),
        codec.dequantize_rows(codec.quantize_to_packed(rows), 48, torch.float32),
    )
    layer.stored = Given(layer.packed)
    assert layer.fake_quantize(rows) is rows


def test_is_finite() -> None:
    assert all_rows_finite(torch.empty(0, 3)) and all_rows_finite(torch.ones(2, 3))
    for value in (torch.nan, torch.inf, -torch.inf):
        assert not all_rows_finite(torch.tensor([1.0, value]))
