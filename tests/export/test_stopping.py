"""Exports stop at the token that ends the trained turns."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from dist_peft.adapters.directory import read_adapter_directory, write_adapter_directory
from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.export.formats.registry import export_model
from dist_peft.export.merge_weights import merge_model
from dist_peft.export.stopping import (
    add_stop_tokens,
    read_stop_tokens,
    read_turn_end_ids,
    warn_missing_stop_token,
)
from tests.support.export_runs import make_run


def write(directory: Path, name: str, content: Any) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": 6}, [5]),
        ({"eos_token_id": [5, 7]}, {}, [5, 7]),
        ({}, {"eos_token_id": 6}, [6]),
        (None, {"eos_token_id": [6]}, [6]),
        (None, {"text_config": {"eos_token_id": 8}}, [8]),
        (None, {"eos_token_id": None}, []),
    ],
)
def test_stop_tokens_and_what_is_added(
    generation: Any, config: Any, wanted: list[int], tmp_path: Path
) -> None:
    if generation is not None:
        write(tmp_path, "generation_config.json", {**generation, "top_p": 0.8})
    write(tmp_path, "config.json", {**config, "bos_token_id": 1})
    assert read_stop_tokens(tmp_path) == wanted
    write(tmp_path / "adapter", "dist_peft.json", {"turn_end": [90, *wanted]})
    add_stop_tokens(tmp_path / "adapter", tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written["eos_token_id"] == [*wanted, 90]
    kept = ("bos_token_id", 1) if generation is None else ("top_p", 0.8)
    assert written[kept[0]] == kept[1]
    before = (tmp_path / "generation_config.json").read_bytes()
    add_stop_tokens(tmp_path / "adapter", tmp_path)  # nothing is missing any more
    assert (tmp_path / "generation_config.json").read_bytes() == before


@pytest.mark.parametrize("value", ["x", 6, [6, "<x>"], [-1], [True], [2.5], {"a": 1}], ids=str)
def test_what_is_no_list_of_tokens_is_refused(value: Any, tmp_path: Path) -> None:
    write(tmp_path, "dist_peft.json", {"turn_end": value})
    with pytest.raises(UserError, match=r"dist_peft\.json is damaged: turn_end is"):
        read_turn_end_ids(tmp_path)


@pytest.mark.parametrize("about", [{}, {"turn_end": None}])
def test_runs_that_do_not_say(about: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, "config.json", {"eos_token_id": 6})
    write(tmp_path, "dist_peft.json", about)
    assert read_turn_end_ids(tmp_path) == []
    add_stop_tokens(tmp_path, tmp_path)
    assert not (tmp_path / "generation_config.json").exists()


def test_warning_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "config.json", {"eos_token_id": 6})
    warn_missing_stop_token(tmp_path, [6], ["</s>"])
    assert not caplog.records
    warn_missing_stop_token(tmp_path, [6, 90], ["</s>", "<|im_end|>"])
    assert "end with '<|im_end|>'" in caplog.text and "stop at token ids [6]" in caplog.text


def test_merged_and_exported_models_stop(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    run = make_run(tmp_path, QuantConfig())
    write_adapter_directory(
        run.adapter_dir, read_adapter_directory(run.adapter_dir), {"turn_end": [300]}
    )
    merge_model(run.base, run.directory, run.adapter_dir, tmp_path / "merged")
    export_model("bnb-nf4", run.job(tmp_path / "bnb"))
    for out in ("merged", "bnb"):
        found = tf.GenerationConfig.from_pretrained(tmp_path / out)
        assert found.eos_token_id == [1, 300]
    reader = gguf.GGUFReader(export_model("gguf", run.job(tmp_path / "a.gguf")).path)
    field = reader.fields["tokenizer.ggml.eot_token_id"]
    assert field.parts[field.data[0]][0] == 300
    assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == 1
