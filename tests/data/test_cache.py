import json
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dist_peft.core.errors import UserError
from dist_peft.data import build_lock
from dist_peft.data.cache import (
    DocumentWriter,
    TokenDocuments,
    combine_sources,
    find_cache_root,
    load_or_build_documents,
)
from dist_peft.data.document_writer import hash_entry_files
from dist_peft.data.files import RecordPlace
from tests.support.data_files import append_document

LENGTHS = (3, 1, 5)


class Build:
    """Counts its calls."""

    def __init__(self, barrier: threading.Barrier | None = None) -> None:
        self.calls = 0
        self.barrier = barrier

    def __call__(self, writer: DocumentWriter) -> None:
        self.calls += 1
        if self.barrier is not None:
            self.barrier.wait()
        for i, length in enumerate(LENGTHS):
            tokens = np.arange(length, dtype=np.int32) + 10 * i
            append_document(writer, tokens, tokens % 2, RecordPlace("ab"[i // 2], i + 1))
        writer.notes = ["hear this"]
        writer.is_text = True
        writer.chat_template = "{{ template }}"


def check(documents: TokenDocuments) -> None:
    assert documents.offsets.tolist() == [0, 3, 4, 9]
    assert documents.tokens.tolist() == [0, 1, 2, 10, 20, 21, 22, 23, 24]
    assert documents.mask.tolist() == [0, 1, 0, 0, 0, 1, 0, 1, 0]
    assert [str(documents.get_place(i)) for i in range(3)] == [
        "a, record 1",
        "a, record 2",
        "b, record 3",
    ]
    assert documents.notes == ("hear this",)
    assert documents.is_text
    assert (documents.largest_token, documents.chat_template) == (24, "{{ template }}")
    assert len(documents) == 3


def test_built_once_and_mapped_after(tmp_path: Path) -> None:
    build = Build()
    first = load_or_build_documents(tmp_path / "new" / "dir", "key", build)
    second = load_or_build_documents(tmp_path / "new" / "dir", "key", build)
    check(first)
    check(second)
    assert first.digest == second.digest
    assert build.calls == 1
    assert isinstance(second.tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        second.tokens[0] = 1


def test_digest_is_of_the_contents(tmp_path: Path) -> None:
    def other(writer: DocumentWriter) -> None:
        Build()(writer)
        append_document(writer, np.zeros(1), np.ones(1), RecordPlace("a", 9))

    one = load_or_build_documents(tmp_path, "one", Build())
    same = load_or_build_documents(tmp_path, "same", Build())
    assert one.digest == same.digest
    assert one.digest != load_or_build_documents(tmp_path, "other", other).digest


@pytest.mark.parametrize("name", ["tokens.npy", "mask.npy", "offsets.npy", "places.npy"])
@pytest.mark.parametrize("damage", ["cut", "missing", "garbage", "other"])
def test_damaged_array_is_built_again(tmp_path: Path, name: str, damage: str) -> None:
    build = Build()
    load_or_build_documents(tmp_path, "key", build)
    file = tmp_path / "key" / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    elif damage == "missing":
        file.unlink()
    elif damage == "garbage":
        file.write_bytes(b"not an array")
    else:
        np.save(file, np.arange(4))
    check(load_or_build_documents(tmp_path, "key", build))
    assert build.calls == 2
    assert [p.name for p in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize("name", ["tokens", "mask", "offsets", "places", "classes"])
def test_altered_bytes_of_the_right_size_are_built_again(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    build = Build()
    load_or_build_documents(tmp_path, "key", build)
    file = tmp_path / "key" / f"{name}.npy"
    data = bytearray(file.read_bytes())
    data[-1 if name in ("tokens", "mask") else -8] ^= 1
    file.write_bytes(data)
    with caplog.at_level("WARNING", "dist_peft"):
        check(load_or_build_documents(tmp_path, "key", build))
    assert build.calls == 2
    words = f"is not as it was written ({name}.npy): the data are tokenized again"
    assert caplog.text.count(words) == 1


@pytest.mark.parametrize("key", ["largest_token", "chat_template", "digest", "hashes"])
def test_altered_description_is_built_again(tmp_path: Path, key: str) -> None:
    build = Build()
    load_or_build_documents(tmp_path, "key", build)
    file = tmp_path / "key" / "meta.json"
    meta = json.loads(file.read_text())
    meta[key] = {"largest_token": 1, "hashes": {}}.get(key, "other")
    file.write_text(json.dumps(meta))
    check(load_or_build_documents(tmp_path, "key", build))
    assert build.calls == 2


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"files": []'])
def test_damaged_meta_is_built_again(tmp_path: Path, text: str) -> None:
    build = Build()
    load_or_build_documents(tmp_path, "key", build)
    (tmp_path / "key" / "meta.json").write_text(text)
    check(load_or_build_documents(tmp_path, "key", build))
    assert build.calls == 2


def test_files_missing_from_meta_are_noticed(tmp_path: Path) -> None:
    build = Build()
    load_or_build_documents(tmp_path, "key", build)
    meta = tmp_path / "key" / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "files": ["a"]}))
    check(load_or_build_documents(tmp_path, "key", build))
    assert build.calls == 2


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(writer: DocumentWriter) -> None:
        Build()(writer)
        raise UserError("bad record")

    with pytest.raises(UserError, match="bad record"):
        load_or_build_documents(tmp_path, "key", fail)
    assert not list(tmp_path.iterdir())


def test_leftovers_of_killed_builds_are_removed(tmp_path: Path) -> None:
    def fail(writer: DocumentWriter) -> None:
        (running,) = tmp_path.glob("key.tmp-*")
        machine, pid = running.name.removeprefix("key.tmp-").split("-")[:2]
        assert int(pid) == os.getpid()
        dead = subprocess.Popen(["true"])
        dead.wait()
        for name in (f"{machine}-{dead.pid}", f"{machine}-{pid}", f"0f-{dead.pid}", "0f-1"):
            (tmp_path / f"other.tmp-{name}-0123456789ab").mkdir()
        (tmp_path / "old.tmp-0123456789ab").mkdir()
        for name in ("old.tmp-0123456789ab", "other.tmp-0f-1-0123456789ab"):
            os.utime(tmp_path / name, (1, 1))
        raise UserError("stop")

    with pytest.raises(UserError, match="stop"):
        load_or_build_documents(tmp_path, "key", fail)
    assert len(list(tmp_path.glob("*.tmp-*"))) == 5
    load_or_build_documents(tmp_path, "key", Build())
    left = "".join(path.name for path in tmp_path.glob("*.tmp-*"))
    assert left.count(".tmp-") == 2  # of this process, and a young one of another machine
    assert f"-{os.getpid()}-" in left and ".tmp-0f-" in left


def test_waiting_instead_of_building_twice(tmp_path: Path) -> None:
    build = Build()
    with ThreadPoolExecutor(4) as pool:
        for made in pool.map(lambda _: load_or_build_documents(tmp_path, "key", build), range(4)):
            check(made)
    assert build.calls == 1


def test_racing_without_locks_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object, **__: object) -> None:
        raise OSError("no locks on this file system")

    monkeypatch.setattr(build_lock.SoftFileLease, "acquire", no_locks)
    build = Build(threading.Barrier(4))
    with ThreadPoolExecutor(4) as pool:
        for made in pool.map(lambda _: load_or_build_documents(tmp_path, "key", build), range(4)):
            check(made)
    assert build.calls == 4
    assert [p.name for p in tmp_path.iterdir()] == ["key"]


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"token cache .*file/x cannot be written: .*cache_dir"):
        load_or_build_documents(tmp_path / "file" / "x", "key", Build())


def test_an_error_of_reading_is_not_blamed_on_the_cache(tmp_path: Path) -> None:
    def fail(_: DocumentWriter) -> None:
        raise OSError("disk of the data")

    with pytest.raises(OSError, match="disk of the data"):
        load_or_build_documents(tmp_path, "key", fail)


def test_cache_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_PEFT_CACHE", "/from/env")
    assert find_cache_root("/given") == Path("/given/tokens")
    assert find_cache_root(None) == Path("/from/env/tokens")
    monkeypatch.delenv("DIST_PEFT_CACHE")
    assert find_cache_root(None) == Path.home() / ".cache" / "dist_peft" / "tokens"


def test_default_cache_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DIST_PEFT_CACHE", raising=False)
    modes = []
    for configured in (None, str(tmp_path / "shared")):
        root = find_cache_root(configured)
        with pytest.raises(UserError, match="stop"):
            load_or_build_documents(root, "key", stop_building)
        modes.append(root.stat().st_mode & 0o777)
    umask = os.umask(0)
    os.umask(umask)
    assert modes == [0o700, 0o777 & ~umask]


def stop_building(writer: DocumentWriter) -> None:
    raise UserError("stop")


def test_conversations_of_several_sources(tmp_path: Path) -> None:
    assert combine_sources([False, None, True]) is True
    assert combine_sources([False, None]) is None and combine_sources([False, False]) is False
    assert load_or_build_documents(tmp_path, "key", Build()).has_conversations is False
    meta = tmp_path / "key" / "meta.json"
    entry = json.loads(meta.read_text())
    del entry["has_conversations"], entry["hashes"]  # as an earlier version wrote it
    entry["hashes"] = hash_entry_files(meta.parent, entry)
    meta.write_text(json.dumps(entry))
    again = Build()
    assert load_or_build_documents(tmp_path, "key", again).has_conversations is None
    assert again.calls == 0
