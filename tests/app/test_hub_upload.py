"""Uploads to the hub: the hub is a double, the export and its comparison are real."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from dist_peft.app import cli, hub_upload
from dist_peft.app.commands.train import train_from_config
from dist_peft.app.hub_upload import HubUpload, format_listing
from dist_peft.app.verified_export import ExportOutcome
from dist_peft.core.config.io import parse_config
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.export.formats.export_spec import ExportResult
from dist_peft.export.model_directory import WriteResult
from tests.support.tiny_runs import tiny_tree

REPO = "somebody/tiny"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("upload")
    assert train_from_config(parse_config(tiny_tree(directory, train__steps=1)), World()) == 0
    close_log()
    return directory / "run"


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    close_log()


class LostConnection(Exception):
    """No ``OSError``, as those of the hub client's HTTP library."""


class Hub:
    """A double of ``HfApi``: repositories by name, whether they are private, and their files."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.error: Exception | None = None

    def model_info(self, repo: str) -> Any:
        if repo not in self.private:
            answer: Any = SimpleNamespace(headers={}, request=None)
            raise RepositoryNotFoundError("404", response=answer)
        return SimpleNamespace(private=self.private[repo])

    def whoami(self) -> dict[str, str]:
        if self.error is not None:
            raise self.error
        return {"name": "somebody"}

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        self.private.setdefault(repo, private)
        return f"https://hub/{repo}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        assert repo_id in self.private
        if self.error is not None:
            raise self.error
        files = [path for path in folder_path.rglob("*") if path.is_file()]
        self.files = {f.relative_to(folder_path).as_posix(): f.read_bytes() for f in files}

    def upload_file(
        self, *, repo_id: str, path_or_fileobj: Path, path_in_repo: str, commit_message: str
    ) -> None:
        self.files[path_in_repo] = path_or_fileobj.read_bytes()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub, of somebody with a token."""
    double = Hub()
    monkeypatch.setattr(hub_upload, "HfApi", lambda: double)
    monkeypatch.setattr(hub_upload, "get_token", lambda: "a token")
    monkeypatch.setattr(hub_upload.constants, "HF_HUB_OFFLINE", False)
    return double


def export(run_dir: Path, out: Path, *words: str, verb: str = "export") -> int:
    form = ["--format", "peft"] if verb == "export" else []
    return cli.main([verb, *form, "--run", str(run_dir), "--out", str(out), *words])


@pytest.mark.e2e
@pytest.mark.parametrize("verb", ["export", "merge"])
def test_dry_run_lists_the_files_and_asks_nobody(
    verb: str,
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub, the network or the token was asked for")

    for where, name in ((hub_upload, "HfApi"), (hub_upload, "get_token"), (socket, "socket")):
        monkeypatch.setattr(where, name, refuse)
    out = tmp_path / "out"
    assert export(run_dir, out, "--push-to-hub", REPO, "--dry-run", "--json", verb=verb) == 0
    printed, logged = capsys.readouterr()
    found = json.loads(printed)["upload"]
    assert (found["repo"], found["private"], found["dry_run"], found["url"]) == (
        REPO,
        True,
        True,
        None,
    )
    listed = {each["name"]: each["bytes"] for each in found["files"]}
    on_disk = {p.relative_to(out).as_posix(): p.stat().st_size for p in out.rglob("*")}
    assert listed == on_disk
    weights = "adapter_model" if verb == "export" else "model"
    assert {"README.md", f"{weights}.safetensors"} <= listed.keys()
    naming = "adapter_config.json, dist_peft.json" if verb == "export" else "merge_record.json"
    assert f"{naming}: the base is named by a path of this machine, {run_dir.parent}" in logged
    lines = format_listing(found)
    total = sum(on_disk.values())
    assert lines[0] == f"would upload {len(listed)} files, {total:,} bytes, to {REPO} (private):"
    assert len(lines) == 1 + len(listed) and lines[-1].split()[-1] == max(listed)


@pytest.mark.e2e
def test_upload_of_a_directory_and_a_failed_one(
    run_dir: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert export(run_dir, out, "--push-to-hub", REPO) == 0
    assert hub.private == {REPO: True}
    assert hub.files == {p.name: p.read_bytes() for p in out.iterdir()}
    assert f"uploaded {out} to https://hub/{REPO}" in capsys.readouterr().err

    hub.error = LostConnection("no route to the hub\nsecond line")
    assert export(run_dir, tmp_path / "other", "--push-to-hub", REPO) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"the upload to {REPO} failed: no route to the hub; {tmp_path / 'other'} is" in last
    assert last.endswith(f"hf upload {REPO} {tmp_path / 'other'} . --private")


def test_upload_of_a_file(tmp_path: Path, hub: Hub) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    upload = HubUpload(REPO, False, file)
    result = ExportResult(WriteResult(1, 0, 0, 4), file, "merged", True)
    compared: Any = SimpleNamespace()
    found = upload.finish(ExportOutcome("gguf", result, "llama.cpp", compared))
    assert hub.files == {"model.gguf": b"GGUF"} and hub.private == {REPO: False}
    assert found["files"] == [{"name": "model.gguf", "bytes": 4}]
    assert found["url"] == f"https://hub/{REPO}"


@pytest.mark.parametrize("is_ours", [True, False])
def test_upload_of_a_file_with_its_card(tmp_path: Path, hub: Hub, is_ours: bool) -> None:
    """The card is ``model.README.md`` here, and the repository's ``README.md``."""
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    card = "---\ntags:\n- dist_peft\n---\n" if is_ours else "my own notes"
    (tmp_path / "model.README.md").write_text(card)
    result = ExportResult(WriteResult(1, 0, 0, 4), file, "merged", True)
    compared: Any = SimpleNamespace()
    HubUpload(REPO, False, file).finish(ExportOutcome("gguf", result, "llama.cpp", compared))
    cards = {"README.md": card.encode()} if is_ours else {}
    assert hub.files == {"model.gguf": b"GGUF"} | cards


def _damage(hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name == "offline":
        monkeypatch.setattr(hub_upload.constants, "HF_HUB_OFFLINE", True)
    elif name == "no token":
        monkeypatch.setattr(hub_upload, "get_token", lambda: None)
    elif name == "no network":
        hub.error = LostConnection("no route to the hub")
    elif name == "public":
        hub.private[REPO] = False


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("offline", ["--push-to-hub", REPO], ["HF_HUB_OFFLINE is set", "--dry-run"]),
        ("no token", ["--push-to-hub", REPO], ["no token", "hf auth login", "HF_TOKEN"]),
        ("no network", ["--push-to-hub", REPO], ["the hub refuses it: no route"]),
        ("public", ["--push-to-hub", REPO], ["is public", "--public"]),
        ("", ["--push-to-hub", REPO, "--no-verify"], ["leave out --no-verify"]),
        ("", ["--push-to-hub", "tiny"], ["--push-to-hub tiny: give USER/NAME"]),
        ("", ["--push-to-hub", "a/b/c", "--dry-run"], ["--push-to-hub a/b/c: give USER/NAME"]),
        ("", ["--dry-run"], ["--dry-run is for --push-to-hub REPO"]),
        ("", ["--public"], ["--public is for --push-to-hub REPO"]),
    ],
)
def test_refused_before_anything_is_written(
    name: str,
    options: list[str],
    words: list[str],
    tmp_path: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _damage(hub, monkeypatch, name)
    assert export(tmp_path / "never read", tmp_path / "out", *options) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert not list(tmp_path.iterdir()) and not hub.files


@pytest.mark.e2e
def test_public_repository_by_consent(
    hub: Hub, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.private[REPO] = False
    assert export(run_dir, tmp_path / "out", "--push-to-hub", REPO, "--public") == 0
    assert hub.files


@pytest.mark.e2e
def test_unverified_output_stays_here(
    run_dir: Path,
    tmp_path: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("dist_peft.export.verify_adapter.find_spec", lambda name: None)
    assert export(run_dir, tmp_path / "out", "--push-to-hub", REPO) == 2
    logged = capsys.readouterr().err.splitlines()
    assert "NOT VERIFIED: peft is not installed" in logged[-2]
    assert "not compared with the trained model" in logged[-1]
    assert (tmp_path / "out" / "README.md").is_file() and not hub.files
