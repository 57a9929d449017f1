"""Where a base comes from, and what is said when it does not."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.model.hub import (
    load_tokenizer,
    public_base_name,
    resolve_base_directory,
    save_tokenizer,
)
from tests.support.data_files import byte_tokenizer


class TestResolveBase:
    def test_directory_as_it_is(self, tmp_path: Path) -> None:
        assert resolve_base_directory(BaseConfig(path=str(tmp_path))) == tmp_path

    def test_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "model").mkdir()
        assert resolve_base_directory(BaseConfig(path="~/model")) == tmp_path / "model"

    def test_hub_id_of_the_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Offline, a snapshot that lies in the cache is enough; the revision chooses it."""
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        repository, commit = tmp_path / "models--some--model", "0123456789" * 4
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (repository / "refs").mkdir()
        (repository / "refs" / "v1").write_text(commit)
        assert resolve_base_directory(BaseConfig(path="some/model", revision="v1")) == snapshot
        with pytest.raises(UserError, match="some/model is neither a local directory"):
            resolve_base_directory(BaseConfig(path="some/model", revision="v2"))

    @pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "~/nowhere/x", "nowhere"])
    def test_missing_path(self, path: str) -> None:
        with pytest.raises(UserError, match=f"base.path {path} does not exist"):
            resolve_base_directory(BaseConfig(path=path))

    def test_file(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        path.touch()
        with pytest.raises(UserError, match=r"model\.safetensors is a file; give the directory"):
            resolve_base_directory(BaseConfig(path=str(path)))

    @pytest.mark.parametrize("path", ["nobody/no-such-model", "not valid/-name-"])
    def test_hub_id_that_cannot_be_had(
        self, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(
            UserError, match=f"{path} is neither a local directory nor available on the hub: .+"
        ):
            resolve_base_directory(BaseConfig(path=path))


class TestLoadTokenizer:
    def test_of_a_directory(self, tmp_path: Path) -> None:
        original = byte_tokenizer()
        original.save_pretrained(tmp_path)
        text = "abcde é"
        assert load_tokenizer(tmp_path)(text).input_ids == original(text).input_ids

    def test_no_files(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        with pytest.raises(UserError, match=f"cannot load the tokenizer of {tmp_path}: .+"):
            load_tokenizer(tmp_path)

    def test_object_of_something_else(self, tmp_path: Path) -> None:
        byte_tokenizer().save_pretrained(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(UserError, match=f"cannot load the tokenizer of {tmp_path}: .+"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize("text", ["{", "[]", "3", "null", '"a"', "", "\xff"])
    @pytest.mark.parametrize(
        "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    )
    def test_damaged(self, name: str, text: str, tmp_path: Path) -> None:
        byte_tokenizer().save_pretrained(tmp_path)
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=f"{tmp_path / name} is damaged: .+"):
            load_tokenizer(tmp_path)


def test_saved_with_another_chat_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    save_tokenizer(tokenizer, tmp_path, "{{ messages[0].content }}!")
    assert not tokenizer.chat_template
    found = load_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "abcde"}]
    assert found.apply_chat_template(messages, tokenize=False) == "abcde!"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the tokenizer into"):
        save_tokenizer(tokenizer, tmp_path / "file" / "x", "")


def test_public_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    assert public_base_name(BaseConfig(path="base")) == str(tmp_path / "base")
    assert public_base_name(BaseConfig(path="org/name")) == "org/name"
