"""Blocks of records: their bounds, pickles, and the memory of reading files of any size."""

import gc
import gzip
import json
import pickle
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from dist_peft.core.config.run import DataSource
from dist_peft.core.errors import UserError
from dist_peft.data import files, readers, record_blocks
from dist_peft.data.documents import load_sequence_set
from dist_peft.data.files import open_source, read_chunks, read_records
from dist_peft.data.record_blocks import ArrowRecords, JsonLines, PlainRecords, group_lines
from tests.support.data_files import byte_tokenizer, data_config

KEY = "data.train[0]"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_blocks, "BLOCK_RECORDS", 4)
    monkeypatch.setattr(record_blocks, "BLOCK_BYTES", 100)


def test_lines_in_blocks(small_blocks: None) -> None:
    lines = ["{}\n", "\n", *["{}\n"] * 4, '{"a": "' + "x" * 200 + '"}\n', " \n", "{}"]
    blocks = list(group_lines(Path("a.jsonl"), lines))
    assert [(block.first, len(block)) for block in blocks] == [(1, 4), (6, 2), (8, 1)]
    assert sum(len(list(block.parse_records())) for block in blocks) == 7
    bad = JsonLines(Path("a.jsonl"), 5, ["\n", "{}\n", "[]\n"], 2)
    with pytest.raises(UserError, match=r"a.jsonl, line 7 is list, not an object"):
        list(pickle.loads(pickle.dumps(bad)).parse_records())


def test_what_was_read_comes_before_an_error(small_blocks: None) -> None:
    def lines() -> Iterator[str]:
        yield from ["{}\n"] * 5
        raise OSError("disk")

    blocks = group_lines(Path("a"), lines())
    assert [len(next(blocks)), len(next(blocks))] == [4, 1]
    with pytest.raises(OSError, match="disk"):
        next(blocks)


def test_rows_in_blocks_no_larger_than_their_own_data(small_blocks: None) -> None:
    rows = [{"t": "é" * (40 if i > 7 else 1), "n": [{"k": i}]} for i in range(12)]
    table = pa.Table.from_pylist(rows)
    (batch,) = table.to_batches()
    parts = list(record_blocks.split_arrow_batch(batch))
    assert max(part.num_rows for part in parts) <= 4
    assert max(part.nbytes for part in parts) <= 200
    copies = [pickle.loads(pickle.dumps(ArrowRecords(None, part))) for part in parts]
    assert [record for copy in copies for record in copy.parse_records()] == rows
    assert [len(copy) for copy in copies] == [part.num_rows for part in parts]
    big = pa.RecordBatch.from_pylist([{"t": "x" * 10_000}] * 100).slice(3, 1)
    assert len(pickle.dumps(ArrowRecords(None, big))) < 12_000


def test_plain_records() -> None:
    assert list(PlainRecords([{"a": 1}]).parse_records()) == [{"a": 1}]


# -- memory --------------------------------------------------------------------------------------

TEXT = "once upon a time " * 40


def write_source(directory: Path, kind: str, count: int) -> Path:
    """A source of ``count`` records of 700 bytes, in one row group or one record batch."""
    records = [{"text": f"{i} {TEXT}"} for i in range(count)]
    file = directory / f"{count}.{kind}"
    lines = [json.dumps(record) for record in records]
    if kind == "jsonl":
        file.write_text("\n".join(lines))
    elif kind == "jsonl.gz":
        file.write_bytes(gzip.compress("\n".join(lines).encode()))
    elif kind == "json":
        file.write_text("[" + ",\n".join(lines) + "]")
    elif kind == "csv":
        file.write_text("text\n" + "\n".join(record["text"] for record in records))
    elif kind == "parquet":
        table = pa.Table.from_pylist(records)
        parquet.write_table(
            table, file, compression="none", use_dictionary=False, data_page_size=2**14
        )
    elif kind == "arrow":
        table = pa.Table.from_pylist(records)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
            out.write_table(table)
    else:
        datasets.Dataset.from_list(records).save_to_disk(str(file))
    return file


def use_local_hub(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Let the set ``org/NAME`` be NAME.parquet in ``directory``, read by ``datasets`` itself."""
    load = datasets.load_dataset

    def load_local(name: str, config: None, **options: Any) -> Any:
        file = directory / f"{name.removeprefix('org/')}.parquet"
        cache = str(directory / "hub cache")
        return load("parquet", data_files=str(file), cache_dir=cache, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_local)


def measure_peak(path: Path | str) -> int:
    """Peak of Python's and Arrow's memory while all records are read."""
    opened = open_source(DataSource(path=str(path)), KEY)
    gc.collect()
    arrow = before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        for _ in read_records(opened, None):
            arrow = max(arrow, pa.total_allocated_bytes())
        return tracemalloc.get_traced_memory()[1] + arrow - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet", "arrow", "saved", "hub"]
)
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Before: a .json list was parsed as a whole, a column of a Parquet row group read at once."""
    monkeypatch.setattr(record_blocks, "BLOCK_BYTES", 2**15)
    for name, value in (("_PEEKED", 2**15), ("_BATCH", 64)):
        monkeypatch.setattr(readers, name, value)
    monkeypatch.setattr(files, "_ROWS", 64)
    sources: list[Path | str]
    if kind == "hub":
        use_local_hub(monkeypatch, tmp_path)
        sources = [f"org/{write_source(tmp_path, 'parquet', n).stem}" for n in (400, 2000)]
    else:
        sources = [write_source(tmp_path, kind, n) for n in (400, 2000)]
    few, many = map(measure_peak, sources)
    assert many < few + 2**17  # the file has 1.1 MB more


def test_sequences_of_a_hub_set_are_those_of_its_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So their order does not depend on the ranks, and any step is found at once, as for files."""
    write_source(tmp_path, "parquet", 300)
    write_source(tmp_path, "jsonl", 300)
    use_local_hub(monkeypatch, tmp_path)
    found = []
    for path in ("org/300", str(tmp_path / "300.jsonl")):
        config = data_config(tmp_path / "cache", seq_len=2048)
        rows = load_sequence_set(config, [DataSource(path=path)], byte_tokenizer(), name="train")
        found.append((rows.fingerprint, len(rows)))
        again = load_sequence_set(config, [DataSource(path=path)], byte_tokenizer(), name="train")
        assert again.fingerprint == rows.fingerprint
    assert found[0] == found[1]
    assert found[0][1] > 50
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2


def test_limit_reads_no_more(tmp_path: Path, small_blocks: None) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n' * 6 + "broken\n" * 6)
    opened = open_source(DataSource(path=str(file)), KEY)
    chunks: list[Any] = list(read_chunks(opened, 6))
    assert [(chunk.first, chunk.count) for chunk in chunks] == [(1, 4), (5, 2)]
    assert [place.number for chunk in chunks for place, _ in chunk.read_records()] == [*range(1, 7)]
