"""What a run can become is said before it is trained, and is what the exports then say."""

import logging
from pathlib import Path
from typing import Any

import pytest

from dist_peft.app.model_setup import build_model
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.config.io import parse_config
from dist_peft.export.formats.registry import FORMATS, list_export_forms
from dist_peft.export.outlook import find_export_obstacles, log_export_outlook
from tests.support.tiny_models import CONFIGS, MIXTURES, save_model
from tests.support.tiny_runs import save_words, tiny_tree

INT = {"kind": "int", "bits": 4, "group_size": 8}
BNB = ("bnb-nf4", "bnb-fp4", "bnb-int8")
KEPT_NF4 = "bnb-nf4 --keep-adapter"


def outlook(tmp_path: Path, model: Any = None, **changes: Any) -> dict[str, str]:
    tree = tiny_tree(tmp_path, **changes)
    if model is not None:
        save_model(model, tmp_path / "base")
        save_words(tmp_path / "base")
    config = parse_config(tree)
    prepared = build_model(resolve_config(config))
    about = config, prepared.adapter, prepared.skeleton, prepared.directory
    log_export_outlook(*about)
    return find_export_obstacles(*about)


@pytest.mark.parametrize(
    ("changes", "possible"),
    [
        ({"base__quant": {"kind": "nf4"}}, {*FORMATS} - {"gptq", "compressed-tensors"}),
        ({"base__quant": INT}, {*FORMATS}),
        (
            {"base__quant": {**INT, "solver": "hqq"}},
            {*FORMATS} - {"gptq", "compressed-tensors"},
        ),
        ({"base__quant": INT, "adapter": {"kind": "qalora", "r": 2}}, {*FORMATS} - {"mlx"}),
        (
            {"adapter": {"kind": "full"}},
            {"hf-bf16", *BNB, "awq", "fp8", "mxfp4", "nvfp4", "mlx", "hf-metal", "gguf"},
        ),
        ({"adapter": {"kind": "prompt"}}, {"peft", "peft-expanded"}),
        ({"adapter": {"kind": "bottleneck"}}, set()),
    ],
    ids=["nf4", "int4", "int4 hqq", "qalora", "full", "prompt", "bottleneck"],
)
def test_methods_and_bases(changes: dict[str, Any], possible: set[str], tmp_path: Path) -> None:
    refused = outlook(tmp_path, **changes)
    assert {*FORMATS} - refused.keys() == possible - {"peft-experts"}  # for mixtures
    assert all(refused.values())


def test_adapted_embedding_of_a_tied_base(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    adapter = {"r": 2, "embeddings": True}
    refused = outlook(tmp_path, CONFIGS["qwen3"], adapter=adapter)
    assert {*FORMATS} - refused.keys() == {"peft", "peft-expanded"}
    assert "adapter.embeddings: false to merge" in refused["hf-bf16"]
    assert "exports of this run: peft, peft-expanded; not hf-bf16" in caplog.text
    # a separate adapter changes the embedding alone, as in training
    kept = outlook(tmp_path / "int", CONFIGS["qwen3"], adapter=adapter, base__quant=INT)
    separate = {"gptq", "compressed-tensors"}
    assert {*FORMATS} - kept.keys() == {"peft", "peft-expanded", *separate}


def test_where_merging_is_possible_the_reasons_are_for_those_who_ask(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    refused = outlook(tmp_path)
    (line,) = [r.message for r in caplog.records if "exports of this run" in r.message]
    assert line.endswith(f"; not {', '.join(refused)} (-v: why)") and "hf-bf16, " in line
    caplog.set_level(logging.DEBUG, "dist_peft")
    outlook(tmp_path / "again")
    assert f"not peft-experts: {refused['peft-experts']}" in caplog.text


@pytest.mark.parametrize(
    ("model", "changes", "reason"),
    [
        ("qwen3", {"adapter": {"r": 2, "embeddings": True}}, None),  # tied
        ("llama", {"adapter": {"r": 2, "init": "loftq"}}, None),
        ("llama", {"adapter": {"kind": "prompt"}}, "virtual tokens"),
        ("llama", {"adapter": {"kind": "prefix"}}, "virtual tokens"),
        ("llama", {"adapter": {"kind": "bottleneck"}}, "nonlinear"),
        ("llama", {"adapter": {"kind": "full"}}, "trains weights, no adapter"),
        ("llama", {"base__quant": None}, "the base has no NF4 codes"),
        ("llama", {"base__quant": INT}, "the base has no NF4 codes"),
        ("llama", {"base__quant": {"kind": "nf4", "group_size": 8}}, "blocks of 32 or 64"),
        ("narrow", {}, "down_proj.weight has in_features 72, which blocks of 64 do not divide"),
        ("mixtral", {}, "mixture of experts"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_kept_codes_are_a_form_of_their_own(
    model: str, changes: dict[str, Any], reason: str | None, tmp_path: Path
) -> None:
    """What hinders a merge need not hinder them, and the other way round."""
    wide = {"hidden_size": 64, "intermediate_size": 72 if model == "narrow" else 128}
    known = {**CONFIGS, **MIXTURES, "narrow": CONFIGS["llama"]}[model]
    config = type(known)(**{**known.to_dict(), **wide})
    refused = outlook(tmp_path, config, **{"base__quant": {"kind": "nf4"}, **changes})
    assert {form.label for _, form in list_export_forms()} == {*FORMATS, KEPT_NF4}
    if reason is None:
        assert KEPT_NF4 not in refused
    else:
        assert reason in refused[KEPT_NF4]
    if "embeddings" in str(changes):
        assert "adapter.embeddings: false to merge" in refused["bnb-nf4"]
    if model == "narrow":
        assert "bnb-nf4" not in refused


def test_families_that_formats_do_not_have(tmp_path: Path) -> None:
    mixture = outlook(tmp_path / "a", MIXTURES["mixtral"])
    packed = {*BNB, "awq", "fp8", "mxfp4", "nvfp4", "mlx", "hf-metal", "gguf"}
    peft = {"peft", "peft-expanded", "peft-experts"}
    assert {*FORMATS} - mixture.keys() == {"hf-bf16", *peft, *packed}
    kept = outlook(tmp_path / "int", MIXTURES["mixtral"], base__quant=INT)
    assert "takes no adapter of PEFT for them" in kept["gptq"]
    assert "without zero points" in kept["compressed-tensors"]
    assert "gguf is written for" in outlook(tmp_path / "b", CONFIGS["opt"])["gguf"]


def test_files_that_will_not_be_copied(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path)
    (tmp_path / "merges").write_text("x")
    (tmp_path / "base" / "merges.txt").symlink_to(tmp_path / "merges")
    config = parse_config(tree)
    prepared = build_model(resolve_config(config))
    about = config, prepared.adapter, prepared.skeleton, prepared.directory
    refused = find_export_obstacles(*about)
    assert "is a link to" in refused["hf-bf16"] and "peft" not in refused
