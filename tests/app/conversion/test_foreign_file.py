"""Which trainer's file it is, and numbers as both trainers read them."""

from pathlib import Path

import pytest

from dist_peft.app.conversion.foreign_file import ForeignFile, is_unset
from dist_peft.core.errors import UserError


def _read(tmp_path: Path, text: str) -> ForeignFile:
    (tmp_path / "a.yml").write_text(text)
    return ForeignFile(tmp_path / "a.yml")


def test_trainers(tmp_path: Path) -> None:
    assert _read(tmp_path, "base_model: m").trainer == "axolotl"
    assert _read(tmp_path, "model_name_or_path: m").trainer == "LLaMA-Factory"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: {path: m}", "is a configuration of dist-peft already"),
        ("model: {_component_: torchtune.models.llama3}", "is of torchtune, which is not"),
        ("lora_r: 8", "has neither base_model .axolotl. nor model_name_or_path"),
        ("[1]", "must hold keys of axolotl or LLaMA-Factory"),
        ("base_model: [", "is not valid YAML"),
        ("a: &a [*a]", "is nested too deeply|is not valid YAML"),
    ],
)
def test_other_files(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        _read(tmp_path, text)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; give the YAML file of axolotl"):
        ForeignFile(tmp_path / "none.yml")
    with pytest.raises(UserError, match="is no file"):
        ForeignFile(tmp_path)


def test_values_are_taken_once(tmp_path: Path) -> None:
    file = _read(tmp_path, "base_model: m\nlr: 2e-4\nn: '3'\nf: 3.0\nempty:\ngone: false\n")
    assert file.list_names() == ["base_model", "lr", "n", "f", "empty", "gone"]
    assert file.take_number("lr") == 2e-4 and not file.has_value("lr")
    assert [file.take_number(name) for name in ("n", "f", "empty", "none")] == [3, 3, None, None]
    assert file.take_number("none", 7) == 7 and file.take_value("base_model", "x") == "m"
    assert file.list_names() == ["gone"] and not file.has_value("gone")


@pytest.mark.parametrize("value", ["true", "fast", "[1]"])
def test_no_number(tmp_path: Path, value: str) -> None:
    with pytest.raises(UserError, match="lr is no number"):
        _read(tmp_path, f"base_model: m\nlr: {value}").take_number("lr")


def test_unset_values() -> None:
    assert all(is_unset(value) for value in (None, False, 0, "", "none", [], {}))
    assert not any(is_unset(value) for value in (True, 1, "x", [0], {"a": None}))
