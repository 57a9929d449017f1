"""What is left when writing fails: the older files, and nothing else."""

import errno
import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dist_peft.core.errors import UserError
from dist_peft.store import writer as writer_module
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader
from dist_peft.store.writer import StreamWriter, TensorSpec, write_atomically
from tests.support.store_files import INDEX

W = torch.arange(12.0).reshape(6, 2)
SPEC = TensorSpec("w", torch.float32, (6, 2))


def _names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


# -- all or nothing --------------------------------------------------------------------------------


def _old_model(directory: Path) -> bytes:
    save_file({"old": torch.ones(3)}, directory / "model.safetensors")
    return (directory / "model.safetensors").read_bytes()


def test_an_older_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    old = _old_model(tmp_path)
    writer = StreamWriter(tmp_path, [SPEC])
    writer.write_rows("w", W)
    assert (tmp_path / "model.safetensors").read_bytes() == old
    writer.close()
    assert SafetensorsIndex.open(tmp_path).tensors.keys() == {"w"}
    assert _names(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    old = _old_model(tmp_path)

    def fail_midway() -> None:
        with StreamWriter(tmp_path, [SPEC]) as writer:
            writer.write_rows("w", W)
            raise error

    with pytest.raises(error):
        fail_midway()
    assert _names(tmp_path) == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == old


def _failing(number: int, after: int = 0) -> Any:
    """A system call that succeeds ``after`` times, then fails."""
    count = itertools.count()

    def call(function: Any) -> Any:
        def wrapped(*args: Any) -> Any:
            if next(count) >= after:
                raise OSError(number, os.strerror(number))
            return function(*args)

        return wrapped

    return call


@pytest.mark.parametrize("name", ["pwrite", "ftruncate", "fsync", "open"])
@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, r"disk full while writing .*/model.*: [\d,]+ bytes are needed in .*; free"),
        (errno.EACCES, r"no permission to write .*/model"),
    ],
)
def test_a_failing_system_call_leaves_nothing_but_the_old_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    after: int,
    number: int,
    words: str,
) -> None:
    specs = [TensorSpec(n, torch.float32, (6, 2)) for n in "abc"]

    def write(value: Tensor) -> None:
        with StreamWriter(tmp_path, specs, max_file_bytes=96) as writer:
            for spec in specs:
                writer.write_rows(spec.name, value)

    write(W)
    with monkeypatch.context() as patch:
        patch.setattr(os, name, _failing(number, after)(getattr(os, name)))
        with pytest.raises(UserError, match=words):
            write(W + 1)
    assert len(_names(tmp_path)) == 3
    with RowReader(SafetensorsIndex.open(tmp_path)) as reader:
        for spec in specs:
            assert torch.equal(reader.read_rows(spec.name), W)


def test_a_broken_disk_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", _failing(errno.EIO)(os.pwrite))
    with pytest.raises(OSError, match="Input/output error"):
        StreamWriter(tmp_path, [SPEC])
    assert _names(tmp_path) == []


def test_a_crash_between_two_renames_leaves_no_whole_looking_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [TensorSpec(n, torch.float32, (6, 2)) for n in "ab"]
    with StreamWriter(tmp_path, specs, max_file_bytes=48) as writer:
        for spec in specs:
            writer.write_rows(spec.name, W)
    writer = StreamWriter(tmp_path, specs, max_file_bytes=48)
    for spec in specs:
        writer.write_rows(spec.name, W + 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _failing(errno.EIO, after=1)(os.replace))
        with pytest.raises(OSError, match="Input/output error"):
            writer.close()
    assert _names(tmp_path) == [file.name for file in writer.files]  # no index, no temporary files
    with pytest.raises(UserError, match=f"but no {INDEX}"):
        SafetensorsIndex.open(tmp_path)


def test_a_full_disk_is_seen_before_the_first_byte(small_disk: Path) -> None:
    spec = TensorSpec("w", torch.uint8, (300_000,))
    with pytest.raises(UserError) as caught:
        StreamWriter(small_disk, [spec])
    message = str(caught.value)
    assert f"writing {small_disk}/model.safetensors needs 300,104 bytes" in message
    assert f"262,144 are free in {small_disk}; free space or choose another" in message
    assert _names(small_disk) == []


def test_a_disk_that_fills_up_on_the_way(small_disk: Path) -> None:
    old = _old_model(small_disk)
    spec = TensorSpec("w", torch.uint8, (200_000,))

    def fill_up() -> None:
        with StreamWriter(small_disk, [spec]) as writer:
            writer.write_rows("w", torch.ones(50_000, dtype=torch.uint8))
            (small_disk / "somebody else").write_bytes(bytes(150_000))
            writer.write_rows("w", torch.ones(150_000, dtype=torch.uint8), 50_000)

    with pytest.raises(UserError, match=r"disk full while writing .*/model.safetensors: 200,104 "):
        fill_up()
    (small_disk / "somebody else").unlink()
    assert _names(small_disk) == ["model.safetensors"]
    assert (small_disk / "model.safetensors").read_bytes() == old
    with pytest.raises(UserError, match="disk full while writing"):
        write_atomically(small_disk / "x", bytes(300_000))
    assert _names(small_disk) == ["model.safetensors"]


def test_a_file_system_that_does_not_know_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage(tmp_path))(0, 0, 0)
    monkeypatch.setattr(writer_module.shutil, "disk_usage", lambda path: usage)
    with StreamWriter(tmp_path, [SPEC]) as writer:
        writer.write_rows("w", W)
    assert _names(tmp_path) == ["model.safetensors"]


def test_a_model_in_other_files_is_not_mixed_in(tmp_path: Path) -> None:
    specs = [TensorSpec(n, torch.float32, (6, 2)) for n in "ab"]
    with StreamWriter(tmp_path, specs, max_file_bytes=48) as writer:
        for spec in specs:
            writer.write_rows(spec.name, W)
    before = _names(tmp_path)
    with pytest.raises(UserError) as caught:
        StreamWriter(tmp_path, specs)
    assert f"{tmp_path} holds a model in other files (model-00001-of-00002" in str(caught.value)
    assert "remove them or choose another directory" in str(caught.value)
    assert _names(tmp_path) == before


def test_an_output_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    for directory in (tmp_path / "f", tmp_path / "f" / "g"):
        with pytest.raises(UserError, match=f"cannot write {directory}: "):
            StreamWriter(directory, [SPEC])


# -- atomic_write ----------------------------------------------------------------------------------


def test_atomic_write(tmp_path: Path) -> None:
    file = tmp_path / "f"
    write_atomically(file, "é\n")
    assert file.read_bytes() == "é\n".encode()
    write_atomically(file, b"")
    assert file.read_bytes() == b""
    assert _names(tmp_path) == ["f"]


@pytest.mark.parametrize("name", ["pwrite", "fsync", "replace"])
def test_atomic_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file = tmp_path / "f"
    file.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, name, _failing(errno.ENOSPC)(getattr(os, name)))
        with pytest.raises(UserError, match=f"disk full while writing {file}: 3 bytes are needed"):
            write_atomically(file, "new")
    assert file.read_text() == "old"
    assert _names(tmp_path) == ["f"]


def test_atomic_write_without_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/none/f: No such file"):
        write_atomically(tmp_path / "none" / "f", "x")
