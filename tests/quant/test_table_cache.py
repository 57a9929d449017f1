"""Tables that a trace on fake tensors builds first do not reach real products."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_peft.core.config.run import QuantConfig
from dist_peft.quant import pack
from dist_peft.quant.codec import make_codec
from dist_peft.quant.table_cache import cache_tables

SETTINGS = [
    {"kind": "nf4"},
    {"kind": "int", "bits": 4, "group_size": 64},
    {"kind": "int", "bits": 3, "group_size": 64},
    {"kind": "int", "bits": 2, "group_size": 64},
]


def test_built_once_for_the_same_arguments() -> None:
    built: list[tuple[int, ...]] = []

    @cache_tables
    def build(size: int, *, fill: int = 0) -> Tensor:
        built.append((size, fill))
        return torch.full((size,), fill)

    assert build(3, fill=1) is build(3, fill=1)
    assert build(3, fill=2).tolist() == [2, 2, 2]
    assert built == [(3, 1), (3, 2)]


@pytest.mark.parametrize("several", [False, True])
def test_fake_tables_are_not_kept(several: bool) -> None:
    @cache_tables
    def build(size: int) -> Tensor | tuple[Tensor, ...]:
        return (torch.ones(size), torch.zeros(size)) if several else torch.ones(size)

    with FakeTensorMode():
        build(2)
    real = build(2)
    first = real[0] if isinstance(real, tuple) else real
    assert type(first) is Tensor and first.tolist() == [1.0, 1.0]
    assert build(2) is real


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_codecs_after_a_trace(settings: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows decoded after a trace have the values that they have without one."""
    codec = make_codec(QuantConfig.model_validate(settings), torch.float32)
    rows = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    packed = codec.quantize_to_packed(rows)
    expected = codec.dequantize_rows(packed, 128, torch.float32)

    table = cache_tables(pack._build_lookup_table.__wrapped__)  # empty, as in a new process
    monkeypatch.setattr(pack, "_build_lookup_table", table)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        codec.dequantize_rows(mode.from_tensor(packed), 128, torch.float32)
    assert torch.equal(codec.dequantize_rows(packed, 128, torch.float32), expected)
