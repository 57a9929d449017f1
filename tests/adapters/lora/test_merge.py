import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from dist_peft.adapters.directory import open_adapter_merger
from dist_peft.adapters.lora.merge import LoraMerger
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span, row_span
from tests.support.adapters import (
    adapted,
    adapter_modules,
    disturb,
    ids,
    int_codec,
    save,
    tiny_llama,
)
from tests.support.lora_models import VARIANTS, Q, trained


def merged_by_peft(original: nn.Module, directory: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(original), directory).merge_and_unload()


def merge_all(merger: LoraMerger, model: nn.Module, parts: int = 1) -> dict[str, Tensor]:
    """Every weight of ``model``, merged in ``parts`` chunks of rows."""
    merged = {}
    for name, weight in model.state_dict().items():
        merged[name] = weight
        if merger.changes_weight(name):
            spans = [row_span(weight.shape[0], parts, part) for part in range(parts)]
            rows = [merger.merge_weight_rows(name, weight[s.slice], s, "original") for s in spans]
            merged[name] = torch.cat(rows)
    return merged


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_equals_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    original, model, merger = trained(tmp_path, **settings)
    ours = merge_all(merger, original)
    expected = merged_by_peft(original, tmp_path).state_dict()
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)
    assert merger.list_unused_tensors() == []
    plain = copy.deepcopy(original)
    plain.load_state_dict(ours)
    torch.testing.assert_close(plain(ids()).logits, model(ids()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"embeddings": True}])
def test_is_row_local(settings: dict[str, Any], tmp_path: Path) -> None:
    original, _, merger = trained(tmp_path, **settings)
    once = merge_all(merger, original)
    for parts in (3, 7):
        again = merge_all(open_adapter_merger(tmp_path), original, parts)
        assert all(torch.equal(again[name], value) for name, value in once.items())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("init", "iterations"), [("default", 1), ("pissa", 4), ("loftq", 1), ("loftq", 3)]
)
def test_decoded_base_gives_the_trained_function(
    init: str, iterations: int, dora: bool, tmp_path: Path
) -> None:
    codec = int_codec(4)
    original, model, merger = trained(
        tmp_path, codec, init=init, init_iterations=iterations, use_dora=dora
    )
    merged = original.state_dict()
    for path, module in adapter_modules(model).items():
        name = f"{path}.weight"
        pieces = []
        for span in Span(0, merged[name].shape[0]).split_into_chunks(13):
            rows = merger.compute_encoded_rows(name, merged[name][span.slice], span)
            packed = codec.quantize_to_packed(rows)
            assert torch.equal(packed, module.base.packed[span.slice])  # the very bytes
            rows = codec.dequantize_rows(packed, rows.shape[1], torch.float32)
            pieces.append(merger.merge_weight_rows(name, rows, span, "decoded"))
        merged[name] = torch.cat(pieces)
    assert merger.list_unused_tensors() == []
    plain = copy.deepcopy(original)
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain(ids()).logits, model(ids()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_an_untrained_start_merges_to_the_original(init: str, tmp_path: Path) -> None:
    original = tiny_llama()
    model, adapter = adapted(original, int_codec(2), r=4, init=init, embeddings=True)
    merger = open_adapter_merger(save(model, adapter, tmp_path))
    merged = merge_all(merger, original)
    for name, weight in original.state_dict().items():
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"embeddings": True}, {"init": "pissa"}])
def test_delta(settings: dict[str, Any], tmp_path: Path) -> None:
    original, _, merger = trained(tmp_path, **settings)
    merged = merge_all(merger, original)
    for name, weight in original.state_dict().items():
        if merger.changes_weight(name):
            span = Span(3, 11)
            delta = merger.compute_delta_rows(name, span)
            torch.testing.assert_close(
                weight[span.slice] + delta, merged[name][span.slice], rtol=1e-6, atol=1e-6
            )


def test_delta_of_dora(tmp_path: Path) -> None:
    _, _, merger = trained(tmp_path, use_dora=True)
    with pytest.raises(UserError, match=r"q_proj\.weight is adapted by DoRA"):
        merger.compute_delta_rows(Q, Span(0, 1))


def test_touches_and_unused(tmp_path: Path) -> None:
    original, _, merger = trained(tmp_path, target_modules=["q_proj"])
    second = Q.replace("layers.0", "layers.1")
    weight = original.state_dict()[Q]
    assert merger.changes_weight(Q)
    assert not merger.changes_weight("model.layers.0.self_attn.k_proj.weight")
    assert not merger.changes_weight("model.layers.0.self_attn.q_proj.bias")
    assert merger.list_unused_tensors() == [Q, second]
    merger.merge_weight_rows(Q, weight[:20], Span(0, 20), "original")
    assert merger.list_unused_tensors() == [Q, second]
    merger.merge_weight_rows(Q, weight[20:], Span(20, 32), "original")
    assert merger.list_unused_tensors() == [second]


def test_residual_of_other_weights_is_the_weight(tmp_path: Path) -> None:
    _, _, merger = trained(tmp_path, init="pissa", target_modules=["q_proj"], embeddings=True)
    rows = torch.ones(2, 32)
    assert merger.compute_encoded_rows("model.norm.weight", rows, Span(0, 2)) is rows
    assert merger.compute_encoded_rows("model.embed_tokens.weight", rows, Span(0, 2)) is rows


def test_pefts_own_adapter(tmp_path: Path) -> None:
    original = tiny_llama()
    config = PeftLoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        rank_pattern={"down_proj": 2},
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(copy.deepcopy(original), config)
    disturb(peft_model)
    peft_model.save_pretrained(tmp_path)
    ours = merge_all(open_adapter_merger(tmp_path), original, parts=2)
    expected = merged_by_peft(original, tmp_path).state_dict()
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


def test_pefts_adapter_on_another_embedding(tmp_path: Path) -> None:
    config = PeftLoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    name, rows = "model.embed_tokens.weight", torch.zeros(67, 32)
    with pytest.raises(UserError, match=r"embed_tokens\.weight: .* trained on another embedding"):
        open_adapter_merger(tmp_path).merge_weight_rows(name, rows, Span(0, 67), "original")


def test_tied_embedding_is_refused(tmp_path: Path) -> None:
    model, adapter = adapted(tiny_llama(tied=True), r=4, embeddings=True)
    save(model, adapter, tmp_path)
    open_adapter_merger(tmp_path)
    with pytest.raises(UserError, match=r"adapts the embedding model\.embed_tokens.*saved with"):
        open_adapter_merger(tmp_path, tied=True)


def test_tied_base_without_an_adapted_embedding(tmp_path: Path) -> None:
    model, adapter = adapted(tiny_llama(tied=True), r=4)
    open_adapter_merger(save(model, adapter, tmp_path), tied=True)


@pytest.mark.parametrize(("rows", "columns", "start"), [(4, 31, 0), (4, 32, 30)])
def test_rows_of_another_base(rows: int, columns: int, start: int, tmp_path: Path) -> None:
    _, _, merger = trained(tmp_path)
    with pytest.raises(UserError, match=r"is for a weight of shape \[32, 32\].*another base"):
        merger.merge_weight_rows(
            Q, torch.ones(rows, columns), Span(start, start + rows), "original"
        )


def test_errors_name_the_directory(tmp_path: Path) -> None:
    trained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 5'))
    (tmp_path / "dist_peft.json").unlink()  # as from PEFT: nothing else says that r was 4
    with pytest.raises(UserError, match=rf"{tmp_path}: adapter tensor .*not \[5, \*\]"):
        open_adapter_merger(tmp_path)
