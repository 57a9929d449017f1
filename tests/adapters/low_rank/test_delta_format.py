from collections.abc import Mapping

import pytest
import torch

from dist_peft.adapters.low_rank.delta_format import DeltaFormat
from dist_peft.adapters.low_rank.delta_merger import ProductDelta
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span


class OnesFormat(DeltaFormat):
    """Adds one to every weight of ``rows`` x 3."""

    peft_types = ("ONES",)
    method_name = "Ones"

    def parse_deltas(self, public: PublicAdapter) -> Mapping[str, ProductDelta]:
        if not public.tensors:
            raise UserError("no rows")
        return {path: ProductDelta(B, torch.ones(1, 3)) for path, B in public.tensors.items()}


def test_checks_and_merges_as_parsed() -> None:
    public = PublicAdapter({"peft_type": "ONES", "r": 1, "alpha": 2}, {"a": torch.ones(4, 1)})
    known = OnesFormat()
    known.check(public)
    assert known.matches(public.config)
    assert known.describe(public.config) == "ONES r=1 alpha=2"
    merged = known.open_merger(public, tied=False).merge_weight_rows(
        "a.weight", torch.zeros(2, 3), Span(1, 3), "original"
    )
    assert torch.equal(merged, torch.ones(2, 3))
    with pytest.raises(UserError, match="no rows"):
        known.check(PublicAdapter(public.config, {}))
