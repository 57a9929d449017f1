"""Secrets are masked by name, by registration and by form; ordinary text stays."""

from pathlib import Path

import pytest

from dist_peft.core import redaction
from dist_peft.core.redaction import is_secret_name, redact_text, register_secret


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_registered", set())


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("token hf_abcdefghijklmnopqrstuv, used", "token ***, used"),
        ("key sk-proj-0123456789abcdefghij", "key ***"),
        ("ghp_0123456789abcdefghij0123", "***"),
        ("AKIAIOSFODNN7EXAMPLE", "***"),
        ("https://me:pass@host/x and s3://:p@h", "https://***@host/x and s3://***@h"),
        ("https://host:8080/a@b", "https://host:8080/a@b"),
        (
            "hf_config, pad_token: <s>, tokens 12345678",
            "hf_config, pad_token: <s>, tokens 12345678",
        ),
    ],
)
def test_known_forms(text: str, masked: str) -> None:
    assert redact_text(text) == masked


def test_values_of_secret_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "01234567")
    monkeypatch.setenv("MY_PASSWORD", "short")
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path))  # a path is no secret
    monkeypatch.setenv("EXPERIMENT", "ablation-three")
    text = f"{'0123456789abcdef' * 2}01234567 short {tmp_path} ablation-three"
    assert redact_text(text) == f"*** short {tmp_path} ablation-three"
    register_secret("ablation-three")
    register_secret("12345678.5")
    assert redact_text("ablation-three 12345678.5") == "*** 12345678.5"


def test_names() -> None:
    secret = ("HF_TOKEN", "TOKEN", "wandb_api_key", "DB_PASSWORD", "AUTH_2", "MY_SECRET_PATH")
    assert all(map(is_secret_name, secret))
    assert not any(map(is_secret_name, ("DATA", "TOKENIZERS_PARALLELISM", "KEYBOARD", "HOME")))
