"""The record of a checkpoint's files."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_peft.core.errors import UserError
from dist_peft.train.checkpoint_files import (
    BestCheckpoint,
    DamagedCheckpointError,
    FileChecksum,
    find_damaged_file,
    format_checksum_record,
    hash_file,
    parse_checkpoint_step,
    read_checksum_record,
    wait_for_files,
)


@pytest.fixture(name="record")
def _record(tmp_path: Path) -> dict[str, FileChecksum]:
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    (tmp_path / "b").write_bytes(b"")
    files = {name: hash_file(tmp_path / name) for name in ("a", "b")}
    (tmp_path / "files.json").write_text(format_checksum_record(files))
    return files


def test_a_record_reads_back(tmp_path: Path, record: dict[str, FileChecksum]) -> None:
    assert record["a"].bytes == 3000 and record["b"].bytes == 0
    assert read_checksum_record(tmp_path) == record
    assert find_damaged_file(tmp_path, record, record) is None
    assert read_checksum_record(tmp_path / "nothing") is None


def test_differences_are_named(tmp_path: Path, record: dict[str, FileChecksum]) -> None:
    (tmp_path / "a").write_bytes(b"abd" + b"abc" * 999)
    assert find_damaged_file(tmp_path, record, ["b"]) is None
    assert "checksum of a" in str(find_damaged_file(tmp_path, record, ["b", "a"]))
    (tmp_path / "a").write_bytes(b"abc")
    assert find_damaged_file(tmp_path, record, ["a"]) == "a has 3 bytes, not 3,000"
    (tmp_path / "a").unlink()
    assert find_damaged_file(tmp_path, record, ["a"]) == "a: No such file or directory"
    (tmp_path / "a").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="symbolic link"):
        find_damaged_file(tmp_path, record, ["a"])


def test_every_flipped_bit_of_the_record_is_found(
    tmp_path: Path, record: dict[str, FileChecksum]
) -> None:
    data = (tmp_path / "files.json").read_bytes()
    for place in range(0, 8 * len(data), 7):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << (place % 8)
        (tmp_path / "files.json").write_bytes(flipped)
        try:
            found = read_checksum_record(tmp_path)
        except DamagedCheckpointError:
            continue
        assert found is not None and found != record
        if found.keys() == record.keys():
            assert find_damaged_file(tmp_path, found, found) is not None


@given(st.binary(max_size=200))
def test_any_content_of_the_record_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    directory = tmp_path_factory.getbasetemp()
    (directory / "files.json").write_bytes(data)
    with pytest.raises(DamagedCheckpointError):
        read_checksum_record(directory)


def test_names_out_of_the_directory_are_refused(tmp_path: Path) -> None:
    text = format_checksum_record({"../a": FileChecksum(1, "0")})
    (tmp_path / "files.json").write_text(text)
    with pytest.raises(DamagedCheckpointError, match="not as it was written"):
        read_checksum_record(tmp_path)


def test_waiting_for_files(tmp_path: Path, record: dict[str, FileChecksum]) -> None:
    assert wait_for_files(tmp_path, {"a": 3000, "b": 0}, 0) is None
    assert wait_for_files(tmp_path, {"a": 3000, "c": 1}, 0.01) == "c"
    assert wait_for_files(tmp_path, {"a": 2999}, 0) == "a"


def test_best(tmp_path: Path) -> None:
    assert BestCheckpoint.read_from(tmp_path) is None
    path = BestCheckpoint.get_path(tmp_path)
    path.write_text(BestCheckpoint(7, "f1", 0.5).to_json())
    assert BestCheckpoint.read_from(tmp_path) == BestCheckpoint(7, "f1", 0.5)
    for text in ("", "[]", "{}", '{"step": "x", "metric": "loss", "value": 1}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"best\.json is damaged"):
            BestCheckpoint.read_from(tmp_path)


def test_step_of_a_name() -> None:
    assert parse_checkpoint_step(Path("x/step-000120")) == 120
    assert parse_checkpoint_step(Path("x/step-last")) == 0
