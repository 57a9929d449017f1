import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from dist_peft.core.config.run import DataSource
from dist_peft.core.errors import UserError
from dist_peft.data.files import RecordPlace, open_source, read_records

KEY = "data.train[0]"


def read(path: Path | str, limit: int | None = None, **fields: Any) -> list[dict[str, Any]]:
    source = DataSource(path=str(path), **fields)
    return [record for _, record in read_records(open_source(source, KEY), limit)]


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr("datasets.load_dataset", refuse)


# -- values stay as they are ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_values_keep_their_type_and_absent_keys_stay_absent(tmp_path: Path, name: str) -> None:
    records = [{"a": "2020-01-01", "b": "002", "m": [{"x": 1}]}, {"a": "NA", "m": [{"y": None}]}]
    text = json.dumps(records) if name == "a.json" else "\n".join(map(json.dumps, records))
    (tmp_path / name).write_text(text)
    assert read(tmp_path / name) == records


def test_a_list_or_lines_of_strings_are_text_records(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('["one", "2"]')
    (tmp_path / "b.jsonl").write_text('"one"\n\n"2"\n')
    expected = [{"text": "one"}, {"text": "2"}]
    assert read(tmp_path / "a.json") == read(tmp_path / "b.jsonl") == expected


def test_json_lines_under_a_json_ending_and_a_single_object(tmp_path: Path) -> None:
    (tmp_path / "lines.json").write_text('{"a": "1"}\n{"a": "2"}\n')
    (tmp_path / "one.json").write_text('{\n "a": "1"\n}\n')
    assert read(tmp_path / "lines.json") == [{"a": "1"}, {"a": "2"}]
    assert read(tmp_path / "one.json") == [{"a": "1"}]


def test_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\ufeffp,q\n1,2\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('\ufeff{"p": "1"}\n', encoding="utf-8")
    assert read(tmp_path / "a.csv") == [{"p": "1", "q": "2"}]
    assert read(tmp_path / "a.jsonl") == [{"p": "1"}]


def test_csv_fields_are_text_with_quotes_and_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('p,q\n002,NA\n"a, ""b""\nc",\n')
    assert read(tmp_path / "a.csv") == [{"p": "002", "q": "NA"}, {"p": 'a, "b"\nc', "q": ""}]


def test_csv_field_longer_than_the_limit_of_the_csv_module(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(read(tmp_path / "a.csv")[0]["text"]) == 200_000


def test_tables_without_a_header_line(tmp_path: Path) -> None:
    """CoLA's layout: four columns, of which the second is the label."""
    (tmp_path / "train.tsv").write_text('gj04\t1\t\tShe "left.\ngj04\t0\t*\tLeft she.\n')
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b'p,"q\nr"\n'))
    cola = ["source", "label", "mark", "sentence"]
    first, second = read(tmp_path / "train.tsv", column_names=cola)
    assert first == {"source": "gj04", "label": "1", "mark": "", "sentence": 'She "left.'}
    assert second["mark"] == "*" and list(second) == cola
    assert read(tmp_path / "a.csv.gz", column_names=["x", "y"]) == [{"x": "p", "y": "q\nr"}]
    with pytest.raises(UserError, match=r"train.tsv, record 1 .* has 4 fields, column_names 2: a"):
        read(tmp_path / "train.tsv", column_names=["a", "b"])
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"0\].column_names is for .csv and .tsv .*b.jsonl"):
        read(tmp_path / "b.jsonl", column_names=cola)


def test_tsv_quotes_are_ordinary_characters(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('p\tq\n"open\tx\n')
    assert read(tmp_path / "a.tsv") == [{"p": '"open', "q": "x"}]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read(tmp_path / "a.txt") == [{"text": "one\n\ntwo\n"}]


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records = [{"p": "1", "m": [{"role": "user", "content": "a"}]}, {"p": "2", "m": []}]
    file = tmp_path / "a [1]*.parquet"  # no pattern: there is such a file
    parquet.write_table(pa.Table.from_pylist(records), file)
    assert read(file) == records


# -- which files ---------------------------------------------------------------------------------


def test_directory_glob_and_limit_run_through_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"n": 3}\n{"n": 4}\n')
    (tmp_path / "a.json").write_text('[{"n": 1}, {"n": 2}]')
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.jsonl").write_text('{"n": 5}\n')
    assert [r["n"] for r in read(tmp_path)] == [1, 2, 3, 4]
    assert [r["n"] for r in read(tmp_path / "*.json*")] == [1, 2, 3, 4]
    assert [r["n"] for r in read(tmp_path / "**" / "*.jsonl")] == [3, 4, 5]
    assert [r["n"] for r in read(tmp_path, limit=3)] == [1, 2, 3]


def test_places_count_records_within_each_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n\n{"n": 2}\n')
    (tmp_path / "b.jsonl").write_text('{"n": 3}\n')
    opened = open_source(DataSource(path=str(tmp_path)), KEY)
    places = [place for place, _ in read_records(opened, None)]
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    assert places == [RecordPlace(a, 1), RecordPlace(a, 2), RecordPlace(b, 1)]
    assert str(places[1]) == f"{a}, record 2"


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    "path", ["nowhere.jsonl", "data/nowhere.jsonl", "./a/b", "/a/b", "a/b/c", "squad", "here/typo"]
)
def test_missing_local_path_is_refused_without_asking_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(UserError, match=rf"data.train\[0\]: file {path} does not exist"):
        read(path)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.xml", r"has the ending .xml; readable are .jsonl, .json, .parquet"),
        ("empty", r"directory .*empty has no file with a readable ending"),
        ("docs", r"directory .*docs has no file with a readable ending .*; it has .md"),
        ("*.csv", r"pattern .*\*.csv has no file with a readable ending"),
    ],
)
def test_nothing_readable(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "a.xml").write_text("<a/>")
    (tmp_path / "empty").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "x.md").write_text("x")
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_split_of_a_local_file_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n')
    read(tmp_path / "a.jsonl", split="test")
    assert "data.train[0].split has no effect" in caplog.text


# -- what save_to_disk wrote ---------------------------------------------------------------------

SAVED = [{"text": "a", "m": [{"role": "user"}]}, {"text": "b", "m": []}]


def test_a_saved_data_set_and_one_with_splits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Before, the description (dataset_info.json) was read as the only record."""
    many = datasets.Dataset.from_list([{"text": str(i)} for i in range(2500)])
    whole = datasets.Dataset.from_list(SAVED)
    whole.save_to_disk(tmp_path / "one")
    splits = {"train": many, "test": whole}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two", num_shards={"train": 3, "test": 1})
    assert read(tmp_path / "one") == SAVED
    assert read(tmp_path / "two") == [{"text": str(i)} for i in range(2500)]
    assert read(tmp_path / "two", split="test") == read(tmp_path / "two" / "test") == SAVED
    assert "split has no effect" not in caplog.text
    (file,) = (tmp_path / "one").glob("*.arrow")
    assert read(file) == SAVED
    with pytest.raises(UserError, match=r"two has no split dev; set .*split to one of train, test"):
        read(tmp_path / "two", split="dev")


def test_images_of_a_saved_data_set_are_not_decoded(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    records = {"text": ["a"], "image": [{"bytes": b"no image"}]}
    saved = datasets.Dataset.from_dict(records, features=features)
    saved.save_to_disk(tmp_path / "arrow")
    saved.to_parquet(tmp_path / "a.parquet")
    expected = [{"text": "a", "image": {"bytes": b"no image"}}]
    assert read(tmp_path / "arrow") == read(tmp_path / "a.parquet") == expected


def test_descriptions_are_no_data(tmp_path: Path) -> None:
    """A directory of the cache of datasets: Arrow files and their description, no state.json."""
    datasets.Dataset.from_list(SAVED).save_to_disk(tmp_path)
    (tmp_path / "state.json").unlink()
    assert read(tmp_path) == SAVED
    next(tmp_path.glob("*.arrow")).unlink()
    with pytest.raises(UserError, match="has no file with a readable ending"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("state.json", '{"_data_files": [{"filename": "../secret.arrow"}]}', "does not name the f"),
        ("state.json", '{"_data_files": [{"filename": "/etc/passwd"}]}', "does not name the f"),
        ("state.json", '{"_data_files": []}', "does not name the f"),
        ("state.json", '{"_data_files": 5}', "does not name the f"),
        ("state.json", '{"_data_files": [{"filename": "gone.arrow"}]}', "gone.arrow is missing"),
        ("state.json", '{"_data_files": ', "state.json is not valid JSON"),
        ("dataset_dict.json", '{"splits": ["../other"]}', "does not name the f"),
        ("dataset_dict.json", "[]", "does not name the f"),
    ],
)
def test_a_saved_directory_that_is_no_such(
    tmp_path: Path, file: str, content: str, message: str
) -> None:
    (tmp_path / "secret.arrow").write_bytes(b"")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / file).write_text(content)
    with pytest.raises(UserError, match=rf"data.train\[0\]: .*{message}"):
        read(tmp_path / "saved")


@pytest.mark.parametrize("path", ["x" * 5000, "y" * 300 + ".jsonl", "x" * 300 + "/*.jsonl"])
def test_a_path_that_no_file_can_have(path: str) -> None:
    with pytest.raises(UserError, match=r"data.train\[0\]: .*(name too long|no file)"):
        read(path)


def test_home_of_an_unknown_user() -> None:
    with pytest.raises(UserError, match=r"data.train\[0\]: path ~nosuchuser/a.jsonl cannot be"):
        read("~nosuchuser/a.jsonl")


# -- the hub -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "asked"),
    [("org/name", ("org/name", None)), ("org/n.a-me:main", ("org/n.a-me", "main"))],
)
def test_hub_id(monkeypatch: pytest.MonkeyPatch, path: str, asked: tuple[str, str | None]) -> None:
    calls = []

    def load(name: str, config: str | None, *, split: str, keep_in_memory: bool) -> Any:
        assert not keep_in_memory
        calls.append((name, config, split))
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr("datasets.load_dataset", load)
    assert read(path, limit=1, split="test") == [{"text": "a"}]
    assert calls == [(*asked, "test")]


@pytest.mark.parametrize("error", [ConnectionError, FileNotFoundError, ValueError])
def test_unreachable_hub_is_one_readable_error(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise error("no\n  luck")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(
        UserError, match=r"org/name is not a local file, and as a Hub .*: no luck\. "
    ):
        read("org/name")


# -- broken files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', r"a.jsonl, line 3 is not valid JSON"),
        ("a.jsonl", b"[1]\n", r"a.jsonl, line 1 is list, not an object or a string"),
        ("a.json", b'[{"a": 1}, 5]', r"a.json, record 2 is int, not an object"),
        ("a.json", b'[{"a": 1},\n', r"a.json is not valid JSON"),
        ("a.json", b'{"a": 1}\n{"a"\n', r"a.json, line 2 is not valid JSON"),
        ("a.txt", b"caf\xe9", r"a.txt is not UTF-8 text"),
        ("a.jsonl", b'{"a": "caf\xe9"}\n', r"a.jsonl is not UTF-8 text"),
        ("a.csv", b"p,q\n1,2\n3\n", r"a.csv, record 2 \(line 3\) has 1 fields, the header 2: p, q"),
        ("a.tsv", b"p\tq\n1\t2\t3\n", r"a.tsv, record 1 \(line 2\) has 3 fields, the header 2"),
        ("a.csv", b'p\n"never closed\n', r"a.csv is not a valid csv table"),
        ("a.csv", b"p,q,p\n1,2,3\n", r"a.csv has more than one column p; rename one"),
        ("a.jsonl", b"[" * 100_000, r"a.jsonl, line 1 is not valid JSON: maximum recursion"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", r"a.jsonl, line 1 is not valid JSON: Exceeds"),
        ("a.json", b'[{"a": ' + b"9" * 5000 + b"}]", r"a.json is not valid JSON: Exceeds"),
        ("a.parquet", b"PAR1 nonsense", r"a.parquet is not valid parquet"),
    ],
)
def test_broken_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)
