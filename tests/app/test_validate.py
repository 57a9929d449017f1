from pathlib import Path

import pytest
import yaml

from dist_peft.app.cli import main
from dist_peft.app.validate import preview_rows
from dist_peft.core.config import DataSource
from tests.data.build import byte_tokenizer, data_config, write_jsonl


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


def test_preview_of_no_row(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}])
    config = data_config(tmp_path / "cache")
    lines = preview_rows(config, [DataSource(path=str(file))], byte_tokenizer(), "train", 0)
    assert len(lines) == 1 and "1 documents in 1 rows" in lines[0]
