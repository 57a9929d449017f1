import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from dist_peft.adapters.directory import open_adapter_merger
from dist_peft.adapters.ia3.merge import Ia3Merger, Rescaling
from dist_peft.adapters.protocol import WeightMerger
from dist_peft.core.config.run import Ia3Config
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span, row_span
from dist_peft.quant.affine import AffineParts
from tests.support.adapters import adapted, disturb, ids, save, tiny_llama

V = "model.layers.0.self_attn.v_proj.weight"
ALL = {"target_modules": "all-linear"}


def shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name: (len(value), value[0].numel() if value.dim() > 1 else 1)
        for name, value in model.state_dict().items()
    }


def trained(directory: Path, **settings: Any) -> tuple[nn.Module, nn.Module, WeightMerger]:
    """(original, trained model, merger)"""
    original = tiny_llama(bias=True)
    model, adapter = adapted(original, method=Ia3Config, **settings)
    disturb(model)
    return original, model.eval(), open_adapter_merger(save(model, adapter, directory))


def merge_all(merger: WeightMerger, model: nn.Module, parts: int) -> dict[str, Tensor]:
    merged = {}
    for name, value in model.state_dict().items():
        merged[name] = value
        if merger.changes_weight(name):
            spans = [row_span(len(value), parts, part) for part in range(parts)]
            merged[name] = torch.cat(
                [merger.merge_weight_rows(name, value[s.slice], s, "original") for s in spans]
            )
    return merged


@pytest.mark.parametrize("settings", [{}, ALL, {**ALL, "feedforward_modules": ["v_proj"]}], ids=str)
@pytest.mark.parametrize("parts", [1, 3])
def test_merged_weights_equal_pefts(settings: dict[str, Any], parts: int, tmp_path: Path) -> None:
    original, model, merger = trained(tmp_path, **settings)
    merger.check_weight_shapes(shapes(original))
    ours = merge_all(merger, original, parts)
    assert merger.list_unused_tensors() == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(copy.deepcopy(original), tmp_path).merge_and_unload()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=0, msg=name)
    fresh = copy.deepcopy(original)
    fresh.load_state_dict(ours)
    with torch.no_grad():
        found, expected = fresh(ids()).logits, model(ids()).logits
        assert not torch.allclose(original(ids()).logits, expected, rtol=1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_biases_of_output_vectors_are_touched(tmp_path: Path) -> None:
    original, _, merger = trained(tmp_path, target_modules=["v_proj", "o_proj"],
                                  feedforward_modules=["o_proj"])  # fmt: skip
    bias = V.replace("weight", "bias")
    assert merger.changes_weight(V) and not merger.changes_weight(bias)
    merger.check_weight_shapes(shapes(original))
    assert merger.changes_weight(bias)
    assert not merger.changes_weight(bias.replace("v_proj", "o_proj"))
    assert not merger.changes_weight(bias.replace("v_proj", "q_proj"))
    assert bias in merger.list_unused_tensors()
    merger.merge_weight_rows(bias, torch.ones(5), Span(0, 5), "original")
    assert bias in merger.list_unused_tensors()
    merger.merge_weight_rows(bias, torch.ones(11), Span(5, 16), "decoded")
    assert bias not in merger.list_unused_tensors() and V in merger.list_unused_tensors()


def test_rows_are_one_rounded_product() -> None:
    vector = torch.tensor([0.3, -2.0, 0.0])
    rows = torch.randn(3, 3)
    out = Ia3Merger({"a": Rescaling(vector, rescales_input=False)})
    out.check_weight_shapes({"a.weight": (3, 3)})
    assert torch.equal(
        out.merge_weight_rows("a.weight", rows[1:], Span(1, 3), "decoded")[0], rows[1] * -2
    )
    columns = Ia3Merger({"a": Rescaling(vector, rescales_input=True)})
    columns.check_weight_shapes({"a.weight": (3, 3)})
    assert torch.equal(
        columns.merge_weight_rows("a.weight", rows, Span(0, 3), "original"), rows * vector
    )
    assert columns.compute_encoded_rows("a.weight", rows, Span(0, 3)) is rows


@pytest.mark.parametrize(
    ("rescales_input", "found", "message"),
    [
        (False, {}, "adapts a, which the base does not have"),
        (False, {"a.weight": (4, 3)}, "a weight of 3 rows, but the base's has 4"),
        (True, {"a.weight": (3, 4)}, "a weight of 3 columns, but the base's has 4"),
    ],
)
def test_another_base_is_refused(
    rescales_input: bool, found: dict[str, tuple[int, int]], message: str
) -> None:
    merger = Ia3Merger({"a": Rescaling(torch.ones(3), rescales_input=rescales_input)})
    with pytest.raises(UserError, match=message):
        merger.check_weight_shapes(found)
    assert merger.list_unused_tensors() == ["a.weight"]


def test_zeros_cannot_hold_it() -> None:
    merger = Ia3Merger({"a": Rescaling(torch.ones(3), rescales_input=False)})
    parts = AffineParts(*(torch.ones(3, 1) for _ in AffineParts._fields))
    with pytest.raises(UserError, match=r"only adapter\.kind qalora merges into zeros"):
        merger.merge_affine_parts("a.weight", parts, Span(0, 3))
