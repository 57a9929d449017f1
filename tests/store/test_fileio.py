import errno
import os
from pathlib import Path

import pytest

from dist_peft.core.errors import UserError
from dist_peft.store import fileio
from dist_peft.store.fileio import (
    OpenFiles,
    read_exactly,
    read_strided,
    translate_read_errors,
    translate_write_errors,
    write_exactly,
)


def test_open_files_are_bounded_and_the_oldest_goes_first(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(4)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]))
    files = OpenFiles(os.O_RDONLY, limit=2)
    first = files.get_descriptor(paths[0])
    files.get_descriptor(paths[1])
    assert files.get_descriptor(paths[0]) == first  # now the newest
    third = files.get_descriptor(paths[2])  # closes 1, whose number the system gives out again
    assert len(files) == 2
    assert files.get_descriptor(paths[0]) == first
    assert os.pread(third, 1, 0) == b"\2"
    files.close()
    assert len(files) == 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(first)


def test_a_held_file_is_not_closed_for_another(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]))
    files = OpenFiles(os.O_RDONLY, limit=1)
    with files.hold_descriptor(paths[0]) as first:
        with files.hold_descriptor(paths[1]) as second:
            assert len(files) == 2
            assert (os.pread(first, 1, 0), os.pread(second, 1, 0)) == (b"\0", b"\1")
        files.get_descriptor(paths[2])  # closes 1, which nothing holds any more
        assert len(files) == 2 and os.pread(first, 1, 0) == b"\0"
    files.close()


@pytest.mark.parametrize("most_bytes", [1 << 30, 40])
def test_strided_pieces_in_few_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_bytes: int
) -> None:
    monkeypatch.setattr(fileio, "_MOST_BYTES_A_CALL", most_bytes)
    file, data = tmp_path / "f", os.urandom(5 + 2000 * 7 - 4)  # the last piece ends the file
    file.write_bytes(data)
    calls, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: calls.append(a) or preadv(*a))
    buffer = bytearray(2000 * 3)
    with file.open("rb") as stream:
        read_strided(stream.fileno(), memoryview(buffer), 5, 3, 7, file)
        expected = b"".join(data[5 + 7 * i : 8 + 7 * i] for i in range(2000))
        assert buffer == expected
        assert len(calls) == (4 if most_bytes > 40 else 400)
        with pytest.raises(UserError, match="changed or was truncated"):
            read_strided(stream.fileno(), memoryview(buffer), 6, 3, 7, file)


def test_reads_and_writes_go_on_after_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_MOST_BYTES_A_CALL", "_MOST_BYTES_A_WRITE"):
        monkeypatch.setattr(fileio, name, 3)
    file = tmp_path / "f"
    data = bytes(range(20))
    with file.open("wb") as stream:
        write_exactly(stream.fileno(), memoryview(data), 5)
    assert file.read_bytes() == bytes(5) + data
    buffer = bytearray(13)
    with file.open("rb") as stream:
        read_exactly(stream.fileno(), memoryview(buffer), 7, file)
    assert buffer == data[2:15]


def test_a_short_read_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(bytes(10))
    with file.open("rb") as stream, pytest.raises(UserError) as caught:
        read_exactly(stream.fileno(), memoryview(bytearray(8)), 5, file)
    assert f"file {file} changed or was truncated while reading" in str(caught.value)
    assert "no byte 10" in str(caught.value)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOENT, "does not exist"),
        (errno.EACCES, "no permission to read"),
        (errno.EISDIR, "is a directory, not a file"),
    ],
)
def test_reading_errors(number: int, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught, translate_read_errors(Path("/d/f")):
        raise OSError(number, os.strerror(number))
    assert "/d/f" in str(caught.value)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk full while writing /d/f: 1,234 bytes are needed in /d; free space"),
        (errno.EDQUOT, "disk full while writing /d/f"),
        (errno.EACCES, "no permission to write /d/f; choose another directory"),
        (errno.EROFS, "no permission to write /d/f"),
        (errno.EFBIG, "/d/f is larger than its file system"),
        (errno.ENOTDIR, "cannot write /d/f: Not a directory"),
    ],
)
def test_writing_errors(number: int, words: str) -> None:
    with pytest.raises(UserError) as caught, translate_write_errors(Path("/d/f"), 1234):
        raise OSError(number, os.strerror(number))
    assert words in str(caught.value)


def test_a_broken_disk_is_no_users_fault() -> None:
    for context in (translate_read_errors(Path("f")), translate_write_errors(Path("f"), 1)):
        with pytest.raises(OSError, match="Input/output error") as caught, context:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        assert not isinstance(caught.value, UserError)


def test_directories_that_cannot_be_synced_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    number = errno.EINVAL
    fileio.sync_directory(tmp_path)
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        fileio.sync_directory(tmp_path)


def test_temporary_names_are_new_hidden_and_beside() -> None:
    first, second = (fileio.make_temporary_name(Path("/d/model.safetensors")) for _ in range(2))
    assert first != second
    assert first.parent == Path("/d")
    assert first.name.startswith(".model.safetensors.")
    assert first.suffix == ".tmp"
