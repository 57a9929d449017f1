"""The converted file is valid, and a value that is not is named before anything is written."""

from pathlib import Path

import pytest

from dist_peft.app.conversion.converted_config import convert_config_file
from dist_peft.core.config.io import load_config
from dist_peft.core.errors import UserError

LEAST = "base_model: m\ndatasets: [{path: a.jsonl}]\nlearning_rate: 1e-4\nadapter: lora\n"


def _convert(tmp_path: Path, text: str) -> str:
    (tmp_path / "theirs.yml").write_text(text)
    return convert_config_file(tmp_path / "theirs.yml", 1)[0]


def test_the_text_is_a_valid_configuration(tmp_path: Path) -> None:
    text = _convert(tmp_path, LEAST + "lora_r: 4\ntrust_remote_code: true\nchat_template: '${x}'")
    first, *lines = text.splitlines()
    assert first == "# Converted by dist-peft convert-config from theirs.yml of axolotl."
    assert "  r: 4  # lora_r" in lines and "  lr: 0.0001  # learning_rate" in lines
    assert "#   trust_remote_code: True -- a file cannot allow it: base.trust_remote_code=" in text
    (tmp_path / "ours.yaml").write_text(text)
    config = load_config(tmp_path / "ours.yaml")
    assert config.train.lr == 1e-4 and not config.base.trust_remote_code


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lora_dropout: 1.5", "theirs.yml: a value of it is not valid here: key adapter.dropout"),
        ("sequence_len: 4", "a value of it is not valid here: key data.seq_len"),
        ("test_datasets: [3]", "a value has another form than axolotl reads"),
        ("lora_target_modules: {a: b}", "a value of it is not valid here: key adapter.target_mod"),
        ("lora_r: many", "lora_r is no number"),
    ],
)
def test_values_that_do_not_fit(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        _convert(tmp_path, LEAST + text)
