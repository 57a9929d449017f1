"""Kept rows, and their encoding in parts; with products in ``test_through_quantizer.py``."""

import pytest
import torch

from dist_peft.adapters.lora.through_rows import encode_by_blocks, keep_rows_exactly
from dist_peft.core.span import Span
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.quant import packed_rows
from dist_peft.quant.fp8 import Fp8Codec


def test_rows_are_kept_in_the_narrowest_exact_type() -> None:
    values = torch.tensor([[1.0, 2.0**-20, 300.0]])
    assert keep_rows_exactly(values).dtype == torch.bfloat16
    half = torch.tensor([[1 + 2.0**-10]])
    assert keep_rows_exactly(half).dtype == torch.float16
    full = torch.tensor([[1 + 2.0**-20]])
    kept = keep_rows_exactly(full)
    assert kept.dtype == torch.float32 and torch.equal(kept, full)
    full.zero_()  # a copy
    assert float(kept) == 1 + 2.0**-20


def test_parts_end_at_multiples_of_64_rows_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no block is multiplied twice; each part has its own place."""
    base = FrozenLinear(8, 300, Fp8Codec(8), False, torch.float32, "m.weight", "cpu")
    monkeypatch.setattr(packed_rows, "CHUNK_ELEMENTS", 128 * 8)
    parts: list[Span] = []

    def encode(span: Span) -> torch.Tensor:
        parts.append(span)
        return torch.full((len(span), 12), len(parts), dtype=torch.uint8)

    found = encode_by_blocks(base, Span(100, 300), encode, torch.device("cpu"))
    assert parts == [Span(100, 128), Span(128, 256), Span(256, 300)]
    assert found[:, 0].tolist() == [1] * 28 + [2] * 128 + [3] * 44
