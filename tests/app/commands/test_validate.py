import os
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub.utils import filter_repo_objects

from dist_peft.app.cli import main
from dist_peft.app.commands.validate import preview_rows
from dist_peft.core.config.run import DataSource
from dist_peft.model import hub_download
from tests.support.data_files import byte_tokenizer, data_config, write_jsonl


def test_rows_with_their_loss_mask_and_without_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "base")  # no config.json and no weights
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "one"}] * 3)
    data = {"train": [str(file)], "packing": False, "cache_dir": str(tmp_path / "cache")}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"base": {"path": str(tmp_path / "base")}, "data": data}))
    assert main(["validate", "--config", str(config), "--rows", "2"]) == 0
    printed = capsys.readouterr().out
    assert "3 documents in 3 rows, 18 tokens, of which 12 contribute to the loss" in printed
    assert printed.count("<s>p[[one</s>]]") == 2
    write_jsonl(file, [{"prompt": "p", "completion": "one", "label": False}])
    assert main(["validate", "--config", str(config)]) == 2
    assert "a.jsonl, record 1: column label is False" in capsys.readouterr().err


def test_variants_of_a_record_are_shown_under_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "synonyms.txt").write_text("good: fine\n")
    augment = {"kind": "eda", "synonyms": str(tmp_path / "synonyms.txt"), "num_aug": 2}
    augment |= {"alpha_ri": 0, "alpha_rs": 0, "p_rd": 0}
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "good ", "completion": "good"}] * 2)
    data = {"packing": False, "cache_dir": str(tmp_path / "cache")}
    data |= {"train": [{"path": str(file), "augment": augment}]}
    config = tmp_path / "run.yaml"
    base = {"path": str(tmp_path / "base")}
    config.write_text(yaml.safe_dump({"base": base, "data": data}))
    assert main(["validate", "--config", str(config), "--rows", "1"]) == 0
    printed = capsys.readouterr().out
    assert "6 documents in 6 rows of 3 epochs with a variant of each record, " in printed
    shown = [line for line in printed.splitlines() if not line.startswith("data.")]
    assert shown == [
        "--- row 0 (epoch 0): 11 tokens",
        "<s>good [[good</s>]]",
        "--- row 2 (epoch 1): 11 tokens",
        "<s>fine [[good</s>]]",
        "--- row 4 (epoch 2): 11 tokens",
        "<s>fine [[good</s>]]",
    ]
    data["eval"] = data["train"]
    config.write_text(yaml.safe_dump({"base": base, "data": data}))
    assert main(["validate", "--config", str(config)]) == 2
    assert "eval[0].augment: held-out records are measured as they are" in capsys.readouterr().err


def test_preview_of_no_row(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}])
    config = data_config(tmp_path / "cache")
    lines = preview_rows(config, [DataSource(path=str(file))], byte_tokenizer(), "train", 0)
    assert len(lines) == 1 and "1 documents in 1 rows" in lines[0]


def test_classification_shows_texts_and_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "base")
    files = []
    for name, label in (("one", "no"), ("two", "b")):
        records = [{"text": f"{name}{i}", "label": label} for i in range(3)]
        files.append(str(write_jsonl(tmp_path / f"{name}.jsonl", records)))
    labels = (["yes", "no"], ["a", "b"])
    train = [
        {"path": file, "format": "classification", "labels": names}
        for file, names in zip(files, labels, strict=True)
    ]
    held_out = [{"path": files[1], "format": "classification", "name": "two"}]
    data = {"train": train, "eval": held_out, "cache_dir": str(tmp_path / "cache")}
    base = {"path": str(tmp_path / "base"), "head": "classifier"}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"base": base, "data": data}))
    assert main(["validate", "--config", str(config), "--rows", "1"]) == 0
    printed = capsys.readouterr().out
    assert "one.jsonl: 3 rows of task one, labels yes, no" in printed
    assert "--- row 0: 5 tokens, label no\n<s>one0\n" in printed
    assert printed.count("--- row 0: 5 tokens, label b\n<s>two0\n") == 2
    assert f"data.eval[0] {files[1]}: 3 rows of task two, labels a, b" in printed


def test_no_weights_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "base")
    asked: list[list[str]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path / "base")

    monkeypatch.setattr(hub_download, "snapshot_download", download)
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}])
    data = {"train": [str(file)], "cache_dir": str(tmp_path / "cache")}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"base": {"path": "some/model"}, "data": data}))
    assert main(["validate", "--config", str(config)]) == 0
    files = ["config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]
    shards = ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"]
    assert sorted(filter_repo_objects([*files, *shards], allow_patterns=asked[0])) == sorted(files)


def test_output_that_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "base")
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}])
    data = {"train": [str(file)], "cache_dir": str(tmp_path / "cache")}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"base": {"path": str(tmp_path / "base")}, "data": data}))
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["validate", "--config", str(config)]) == 0
