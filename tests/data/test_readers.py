import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from dist_peft.core.errors import UserError
from dist_peft.data.readers import find_data_ending, read_record_file

LINES = b"".join(b'{"text": "line %d"}\n' % i for i in range(3000))
RECORDS = [{"text": f"line {i}"} for i in range(3000)]


def zstd(data: bytes) -> bytes:
    packed: bytes = pa.compress(data, codec="zstd", asbytes=True)
    return packed


PACK = {".gz": gzip.compress, ".zst": zstd}


def read(path: Path) -> list[dict[str, Any]]:
    return list(read_record_file(path))


# -- compressed files ----------------------------------------------------------------------------


@pytest.mark.parametrize("compression", PACK)
def test_compressed_as_plain(tmp_path: Path, compression: str) -> None:
    """Several members in one file, as parallel compressors write, and every text ending."""
    pack = PACK[compression]
    contents = {
        "a.jsonl": (pack(LINES), RECORDS),
        "b.JSONL": (pack(b"\xef\xbb\xbf" + LINES[:20]) + pack(LINES[20:]), RECORDS),
        "c.json": (pack(json.dumps(RECORDS).encode()), RECORDS),
        "d.v2.json": (pack(LINES), RECORDS),
        "e.csv": (pack(b'p,q\n002,"a\r\nb"\n'), [{"p": "002", "q": "a\r\nb"}]),
        "f.tsv": (pack(b'p\tq\n"x\ty\n'), [{"p": '"x', "q": "y"}]),
        "g.txt": (pack(b"one\ntwo\n"), [{"text": "one\ntwo\n"}]),
        "h.jsonl": (pack(b""), []),
    }
    for name, (content, expected) in contents.items():
        file = tmp_path / (name + compression)
        file.write_bytes(content)
        assert read(file) == expected, name


@pytest.mark.parametrize("compression", PACK)
def test_a_broken_compressed_file_is_named(tmp_path: Path, compression: str) -> None:
    whole = PACK[compression](LINES)
    for broken in (whole[: len(whole) // 2], whole[:-5], b"no archive at all", LINES):
        file = tmp_path / f"a.jsonl{compression}"
        file.write_bytes(broken)
        with pytest.raises(
            UserError, match=rf"a.jsonl{compression} is not a complete {compression}"
        ):
            read(file)
    file.write_bytes(PACK[compression](b'{"a": "caf\xe9"}'))
    with pytest.raises(UserError, match=rf"a.jsonl{compression} is not UTF-8"):
        read(file)


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("a.jsonl", ".jsonl"),
        ("a.b.JSON.GZ", ".json.gz"),
        ("a.zst", None),
        ("a.parquet.gz", None),
        ("a.tar.gz", None),
        ("jsonl", None),
        ("a.jsonl.bz2", None),
    ],
)
def test_ending(name: str, ending: str | None) -> None:
    assert find_data_ending(Path("dir.json") / name) == ending


# -- typed columns -------------------------------------------------------------------------------


def test_arrow_stream_and_file(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(RECORDS)
    for name, writer in (("s.arrow", pa.ipc.new_stream), ("f.arrow", pa.ipc.new_file)):
        with pa.OSFile(str(tmp_path / name), "wb") as sink, writer(sink, table.schema) as out:
            out.write_table(table, max_chunksize=1100)
        assert read(tmp_path / name) == RECORDS


def written(directory: Path, kind: str) -> bytes:
    table = pa.Table.from_pylist([{"p": f"é {i}", "m": [{"r": str(i)}]} for i in range(300)])
    file = directory / f"whole.{kind}"
    if kind == "parquet":
        parquet.write_table(table, file)  # snappy, as is the default
    else:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
            out.write_table(table)
    return file.read_bytes()


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_altered_bytes_are_refused_or_read(tmp_path: Path, kind: str) -> None:
    """Whatever bit is flipped: records, or one message that names the file; most are noticed."""
    whole = written(tmp_path, kind)
    refused = []

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.integers(0, len(whole) - 1), st.integers(0, 7))
    def flip(place: int, bit: int) -> None:
        altered = bytearray(whole)
        altered[place] ^= 1 << bit
        file = tmp_path / f"a.{kind}"
        file.write_bytes(altered)
        try:
            read(file)
        except UserError as error:
            refused.append(str(error))

    flip()
    assert refused
    assert all(f"a.{kind} is not valid {kind}: " in message for message in refused)


def test_parquet_whose_compressed_page_is_damaged(tmp_path: Path) -> None:
    """Before: a traceback of OSError, "Corrupt snappy compressed data"."""
    altered = bytearray(written(tmp_path, "parquet"))
    for place in range(40, 140):
        altered[place] ^= 255
    file = tmp_path / "a.parquet"
    file.write_bytes(altered)
    with pytest.raises(
        UserError, match=r"a.parquet is not valid parquet: .*; download or write it"
    ):
        read(file)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow"])
def test_no_right_to_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    (tmp_path / name).chmod(0)
    with pytest.raises(UserError, match=rf"{name} cannot be read: permission denied"):
        read(tmp_path / name)
