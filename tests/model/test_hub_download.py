"""What is downloaded of a repository, and how a signal ends it (with a stand-in for the hub)."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.core.stop_signals import StopRequested, catch_stop_signals
from dist_peft.model import hub, hub_download
from dist_peft.model.hub_download import download_snapshot, select_weight_files
from dist_peft.store.index import INDEX_NAME

SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
LOOSE = ["a.safetensors", "b.safetensors"]
MISTRAL = ["config.json", INDEX_NAME, *SHARDS, "consolidated.safetensors", "original/a.safetensors"]


@dataclass
class Hub:
    """A repository on the hub; ``asked`` lists the requests."""

    snapshot: Path
    files: list[str]
    asked: list[str] = field(default_factory=list)
    slow: threading.Event | None = None
    offline: bool = False

    def snapshot_download(
        self, name: str, *, revision: str | None, allow_patterns: list[str]
    ) -> str:
        self.asked.append(f"snapshot of {name}")
        assert "*.safetensors" not in allow_patterns
        self.snapshot.mkdir(parents=True, exist_ok=True)
        if INDEX_NAME in self.files:
            weights = {f"w{n}": shard for n, shard in enumerate(SHARDS)}
            (self.snapshot / INDEX_NAME).write_text(json.dumps({"weight_map": weights}))
        return str(self.snapshot)

    def list_repo_files(self, name: str, *, revision: str) -> list[str]:
        if self.offline:
            raise ConnectionError("offline")
        assert revision == self.snapshot.name
        self.asked.append("list")
        return self.files

    def hf_hub_download(self, name: str, file: str, *, revision: str) -> None:
        if self.offline:
            raise LocalEntryNotFoundError(f"{file} is not cached")
        assert revision == self.snapshot.name
        self.asked.append(file)
        if self.slow is not None:
            self.slow.wait(20)
        (self.snapshot / file).touch()


MakeHub = Callable[[list[str]], Hub]


@pytest.fixture
def make_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeHub:
    def make(files: list[str]) -> Hub:
        stand_in = Hub(tmp_path / "snapshots" / "c0ffee", files)
        for name in ("snapshot_download", "hf_hub_download"):
            monkeypatch.setattr(hub_download, name, getattr(stand_in, name))
        monkeypatch.setattr(hub_download, "HfApi", lambda: stand_in)
        monkeypatch.setattr(hub, "_downloaded", {})
        return stand_in

    return make


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (MISTRAL, SHARDS),
        (["model.safetensors", *SHARDS, "tf.h5"], ["model.safetensors"]),
        (
            ["a.safetensors", "b.safetensors", "consolidated.safetensors"],
            ["a.safetensors", "b.safetensors"],
        ),
        (["consolidated.safetensors"], ["consolidated.safetensors"]),
        (["pytorch_model.bin"], []),
    ],
    ids=["named shards", "one file", "loose files", "nothing else", "pickle"],
)
def test_only_files_that_are_loaded(
    make_hub: MakeHub, files: list[str], expected: list[str]
) -> None:
    stand_in = make_hub(files)
    directory = download_snapshot("org/name", None)
    assert sorted(p.name for p in directory.glob("*.safetensors")) == expected
    stand_in.asked.clear()
    download_snapshot("org/name", None)
    assert stand_in.asked == ["snapshot of org/name", "list"]  # all files are there


def test_ranks_ask_the_hub_once(make_hub: MakeHub) -> None:
    stand_in = make_hub(MISTRAL)
    base = BaseConfig(path="org/name")
    directory = hub.download_base(base)
    assert sorted(stand_in.asked) == sorted(["snapshot of org/name", "list", *SHARDS])
    stand_in.asked.clear()
    assert hub.resolve_base_directory(base) == hub.download_base(base) == directory
    assert stand_in.asked == []


def test_offline_cache_has_to_be_complete(make_hub: MakeHub) -> None:
    stand_in = make_hub(MISTRAL)
    download_snapshot("org/name", None)
    stand_in.offline = True
    assert download_snapshot("org/name", None) == stand_in.snapshot
    (stand_in.snapshot / SHARDS[1]).unlink()
    with pytest.raises(UserError, match=f"available on the hub: {SHARDS[1]} is not cached"):
        hub.resolve_base_directory(BaseConfig(path="org/name"))


def test_signal_ends_a_download(make_hub: MakeHub) -> None:
    stand_in = make_hub(MISTRAL)
    stand_in.slow = threading.Event()
    beats: list[float] = []

    def beat() -> None:
        beats.append(time.monotonic())
        if len(beats) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    start = time.monotonic()
    with catch_stop_signals(), pytest.raises(StopRequested):
        download_snapshot("org/name", None, beat=beat)
    assert time.monotonic() - start < 10
    stand_in.slow.set()


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_damaged_index(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(UserError, match=r"index\.json is damaged: "):
        select_weight_files(tmp_path, MISTRAL)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors"])
def test_index_that_leads_elsewhere(name: str, tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match=r"names the file .*x\.safetensors, which is not in its"):
        select_weight_files(tmp_path, MISTRAL)
