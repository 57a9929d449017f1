"""Experts that are called in another way, against those of ``transformers`` with the same
weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_peft.adapters.targets import list_adapter_targets
from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.expert_variants import EXPERT_CLASSES, IdentityExperts
from dist_peft.model.experts import ExpertStack, FrozenExperts
from dist_peft.store.reader import RowReader
from tests.support.loaded_models import IDS, copy_decoded, load, logits
from tests.support.tiny_models import CONVERTED, VARIANTS, save_model

_FORMS = {
    "dbrx": "routed",
    "jetmoe": "one_product",
    "longcat_flash": "with_identities",
    "inkling_text": "shared",
}


def _families() -> list[str]:
    return [name for name in _FORMS if name in VARIANTS]


@pytest.mark.parametrize("quant", [None, QuantConfig()], ids=["none", "nf4"])
@pytest.mark.parametrize("family", _families())
def test_model_equals_transformers(
    family: str, quant: QuantConfig | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The logits, and the gradient of the embeddings, which comes through the routers too."""
    original = save_model(VARIANTS[family], tmp_path)
    mine = load(tmp_path, quant=quant).model
    assert "does not use" not in caplog.text
    kinds = {type(m) for m in mine.modules() if isinstance(m, FrozenExperts)}
    assert EXPERT_CLASSES[_FORMS[family]] in kinds  # type: ignore[index]
    if quant is not None:
        copy_decoded(mine, original)
    results = []
    for model in (mine, original):
        x = mine.get_input_embeddings()(IDS[:, :12]).detach().requires_grad_()
        found = model(inputs_embeds=x, use_cache=False).logits
        scaled = found / found.detach().abs().max()
        scaled.square().sum().backward()
        assert x.grad is not None
        results.append((scaled.detach(), x.grad / x.grad.abs().max()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_matrices_of_all_experts_in_one(tmp_path: Path) -> None:
    """DBRX's second product is read by columns of each expert's rows, the first ones by rows."""
    original: Any = save_model(VARIANTS["dbrx"], tmp_path)
    skeleton = load(tmp_path)
    with RowReader(skeleton.index) as reader:
        for own, turned in (("w1", False), ("v1", False), ("w2", True)):
            path = f"transformer.blocks.1.ffn.experts.mlp.{own}"
            stack = skeleton.model.get_submodule(path)
            assert isinstance(stack, ExpertStack) and stack.is_transposed == turned
            whole = original.get_parameter(path).detach().view(4, 104, 64)
            rows = (whole.transpose(1, 2) if turned else whole).flatten(0, 1)
            for span in (Span(0, len(rows)), Span(60, 211), Span(5, 5)):
                assert torch.equal(stack.read_packed_rows(reader, span), rows[span.slice])


def test_experts_without_weights_have_no_rows(tmp_path: Path) -> None:
    save_model(VARIANTS["longcat_flash"], tmp_path)
    skeleton = load(tmp_path)
    (experts, *_) = (m for m in skeleton.model.modules() if isinstance(m, IdentityExperts))
    stack = experts.get_submodule("gate_up_proj")
    assert isinstance(stack, ExpertStack) and stack.packed.shape[0] == 3 * 2 * 32
    index = torch.tensor([[0, 3], [4, 3], [2, 0]])
    assert experts.count_rows(torch.empty(3, 64), index).tolist() == [2, 0, 1]
    x, weights = torch.randn(3, 64), torch.rand(3, 2)
    y = experts(x, index, weights)
    torch.testing.assert_close(y[1], weights[1].sum() * x[1])


@pytest.mark.parametrize("family", _families())
def test_they_are_not_adapted(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(VARIANTS[family], tmp_path)
    model = load(tmp_path).model
    limited = [n for n, m in model.named_modules() if getattr(m, "limit", "")]
    with caplog.at_level("INFO"):
        assert not {*limited} & {*list_adapter_targets("all-linear", model)}
    assert "all-linear leaves out experts: " in caplog.text
    with pytest.raises(UserError, match="experts of a mixture that are not adapted"):
        list_adapter_targets([limited[0]], model)


@pytest.mark.skipif("inkling2_text" not in CONVERTED, reason="transformers has no such type")
def test_rows_of_gate_and_up_in_turn(tmp_path: Path) -> None:
    """Packed as in the files; converted files have them one after the other."""
    original = save_model(CONVERTED["inkling2_text"], tmp_path / "own")
    original.save_pretrained(tmp_path / "converted", save_original_format=False)
    for name, limited in (("own", True), ("converted", False)):
        mine = load(tmp_path / name).model
        stack = mine.get_submodule("model.layers.0.mlp.experts.gate_up_proj")
        assert isinstance(stack, ExpertStack) and bool(stack.limit) == limited
        whole = original.get_parameter("model.layers.0.mlp.experts.gate_up_proj").detach()
        in_turn = whole.view(3, 2, 32, 64).transpose(1, 2).flatten(1, 2)
        expected = in_turn if limited else whole
        rows = stack.dequantize_weight(torch.float32)
        assert torch.equal(rows, expected.flatten(0, 1))
        torch.testing.assert_close(
            logits(mine, input_ids=IDS), logits(original, input_ids=IDS), rtol=1e-5, atol=1e-6
        )
