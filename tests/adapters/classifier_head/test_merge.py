from pathlib import Path
from typing import Any

import torch

from dist_peft.adapters.classifier_head.merge import HeadMerger
from dist_peft.core.span import Span
from tests.support.lora_models import Q, trained

HEAD = {"classifier.weight": torch.arange(12.0).view(4, 3), "classifier.bias": torch.ones(4)}


def test_head_is_given_and_the_trunk_merged(tmp_path: Path) -> None:
    original, _, trunk = trained(tmp_path)
    merger = HeadMerger(trunk, HEAD)
    assert merger.changes_weight("classifier.weight") and merger.changes_weight(Q)
    assert not merger.changes_weight("model.norm.weight")
    assert set(merger.list_unused_tensors()) > {"classifier.weight", "classifier.bias", Q}

    rows: Any = torch.zeros(2, 3)
    parts = [
        merger.merge_weight_rows("classifier.weight", rows, Span(a, a + 2), "original")
        for a in (0, 2)
    ]
    assert torch.equal(torch.cat(parts), HEAD["classifier.weight"])
    assert (
        "classifier.weight" not in merger.list_unused_tensors()
        and "classifier.bias" in merger.list_unused_tensors()
    )

    weight, span = original.state_dict()[Q], Span(0, 32)
    found = merger.merge_weight_rows(Q, weight.clone(), span, "original")
    torch.testing.assert_close(found, weight + trunk.compute_delta_rows(Q, span))
    assert Q not in merger.list_unused_tensors()
    assert torch.equal(merger.compute_encoded_rows(Q, weight, span), weight)
