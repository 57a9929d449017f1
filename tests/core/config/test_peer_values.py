"""Each value of other trainers is refused by its key here, and its settings are valid."""

from pathlib import Path

import pytest

from dist_peft.core.config.io import load_config
from dist_peft.core.config.peer_values import (
    PEER_VALUES,
    describe_peer_value,
    find_peer_value,
    read_setting,
)
from dist_peft.core.config.validation_messages import list_config_keys
from dist_peft.core.errors import UserError

LEAST = "base: {path: model}\ndata: {train: [a.jsonl]}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(LEAST)
    return tmp_path / "run.yaml"


@pytest.mark.parametrize("key", PEER_VALUES)
def test_settings_are_valid_and_the_value_itself_is_not(key: str, file: Path) -> None:
    assert key in list_config_keys()
    for value, settings in PEER_VALUES[key].items():
        assert value == value.lower()
        given = f"data.train={{path: a, format: {value}}}" if "[]" in key else f"{key}={value}"
        taken = key == "base.quant.kind" and value in (
            "nf4",
            "int",
            "mxfp4",
            "fp8",
            "nvfp4",
            "fp4",
            "llm_int8",
        )  # of base.quant, too
        if not taken:
            with pytest.raises(UserError, match=r"there is no such value|write ") as caught:
                load_config(file, [given])
            assert all(setting.partition("=")[0] in str(caught.value) for setting in settings)
        if settings:
            assert load_config(file, settings)
        for setting in settings:
            assert read_setting(setting)[0] == setting.partition("=")[0]


def test_keys_of_lists_and_other_spellings() -> None:
    chat = ("data.train={path: FILE, format: chat}",)
    assert find_peer_value("data.train.0.format", "ShareGPT ") == chat
    assert find_peer_value("data.eval.12.format", "sharegpt") == chat
    assert find_peer_value("resume", True) == ("resume=auto",)
    assert find_peer_value("adapter.kind", "LOHA") == ("adapter.kind=loha",)
    assert find_peer_value("adapter.kind", "lorra") is None
    assert find_peer_value("base.quant", ["nf4"]) is None
    assert find_peer_value("train.lr", "nf4") is None


def test_descriptions() -> None:
    text = "write adapter.kind: lora and base.quant: {kind: nf4}"
    assert describe_peer_value("adapter.kind", "qlora") == text
    assert describe_peer_value("adapter.kind", "oft") == "there is no such value here"
    assert describe_peer_value("adapter.kind", "lora2") is None
