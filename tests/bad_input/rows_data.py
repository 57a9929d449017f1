"""Bad data files, records and chat templates."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from tests.bad_input.case import Row, both, cut, fifo, flip, link, records, write

GOOD = {"prompt": "w9 ", "completion": "w5 w6"}
USER = {"role": "user", "content": "w9"}


def _file(name: str, file: str, content: str | bytes, *words: str) -> Row:
    """A row that trains on one more file."""
    return Row(name, "train", (file, *words), write(file, content), (f"data.train=[{file}]",))


def _records(name: str, items: list[Any], *words: str, args: tuple[str, ...] = ()) -> Row:
    return Row(name, "train", words, records("train.jsonl", *items), args)


def _chat(name: str, messages: Any, *words: str) -> Row:
    return Row(name, "chat", ("chat.jsonl", *words), records("chat.jsonl", {"messages": messages}))


def _template(name: str, text: Any, *words: str) -> Row:
    """A row with a chat template."""

    def damage(root: Path) -> None:
        file = root / "base/tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": text}))

    return Row(f"template {name}", "chat", ("chat template", *words), damage)


def _parquet(compression: str = "snappy") -> Any:
    def damage(root: Path) -> None:
        words = [f"w{i % 90} w{(i * 7) % 90}" for i in range(2000)]
        table = pa.table({"prompt": words, "completion": words})
        parquet.write_table(
            table, root / "x.parquet", compression=compression, write_page_checksum=True
        )

    return damage


USE_PARQUET = ("data.train=[x.parquet]",)

ROWS = [
    # -- the split and the template
    Row(
        "split of all records",
        "train",
        ("data.val_split 9", "hold out 9 of the 4 records", "lower it"),
        args=("data.eval=[]", "data.val_split=9"),
    ),
    Row(
        "split and held-out data",
        "train",
        ("val_split", "give one of them"),
        args=("data.val_split=0.5",),
    ),
    Row(
        "split of equal records",
        "train",
        ("data.val_split", "equal ones", "remove the repeated"),
        records("train.jsonl", *[GOOD] * 8),
        args=("data.eval=[]", "data.val_split=0.5"),
    ),
    Row(
        "template missing",
        "chat",
        ("data.chat_template x.jinja", "no such file", "give a file"),
        args=("data.chat_template=x.jinja",),
    ),
    Row(
        "template of something else",
        "chat",
        ("data.chat_template base/config.json", "no chat template"),
        args=("data.chat_template=base/config.json",),
    ),
    Row(
        "template cut",
        "chat",
        ("data.chat_template", "not valid jinja"),
        write("x.jinja", "{% for m in messages %}{{ m['content'] }}"),
        args=("data.chat_template=x.jinja",),
    ),
    # -- files
    Row(
        "data missing",
        "train",
        ("nowhere.jsonl does not exist", "give a file"),
        args=("data.train=[nowhere.jsonl]",),
    ),
    Row("data empty", "train", ("train.jsonl", "no record"), write("train.jsonl", "")),
    Row(
        "data path too long",
        "train",
        ("cannot be accessed", "too long"),
        args=(f"data.train=[{'x' * 300}.jsonl]",),
    ),
    Row(
        "data path with NUL", "train", ("data.train", "null"), args=('data.train=["a\\0b.jsonl"]',)
    ),
    Row("data path empty", "train", ("data.train.0", "an empty path"), args=("data.train=['']",)),
    Row("data a FIFO", "train", ("train.jsonl", "regular file"), fifo("train.jsonl")),
    Row(
        "data a device", "train", ("train.jsonl", "regular file"), link("train.jsonl", "/dev/zero")
    ),
    Row("data a FIFO, held out", "train", ("eval.jsonl", "regular file"), fifo("eval.jsonl")),
    _file("jsonl cut", "x.jsonl", '{"prompt": "w9", "comp', "line 1 is not valid JSON"),
    _file("jsonl utf-16", "x.jsonl", '{"text": "w9"}'.encode("utf-16"), "utf-8"),
    _file("jsonl a number", "x.jsonl", "5\n", "line 1 is int"),
    _file("jsonl deep nesting", "x.jsonl", '{"text": ' + "[" * 100_000, "line 1 is not valid JSON"),
    _file(
        "jsonl a long number", "x.jsonl", '{"text": ' + "9" * 5000 + "}", "line 1 is not valid JSON"
    ),
    _file("jsonl a lone surrogate", "x.jsonl", '{"text": "w9 \\ud800"}\n', "record 1"),
    _file("json cut", "x.json", '[{"text": "w9"}', "not valid JSON"),
    _file("csv of unequal rows", "x.csv", "prompt,completion\nw1,w2,w3\n", "record 1", "fields"),
    _file(
        "csv of one column twice",
        "x.csv",
        "prompt,prompt\nw1,w2\n",
        "more than one column prompt",
        "rename",
    ),
    _file(
        "gzip cut",
        "x.jsonl.gz",
        gzip.compress(b'{"text": "w9 w8 w7 w6"}\n')[:-12],
        "not a complete .gz file",
    ),
    Row(
        "parquet cut",
        "train",
        ("x.parquet is not valid parquet",),
        both(_parquet(), cut("x.parquet", -500)),
        USE_PARQUET,
    ),
    Row(
        "parquet flipped byte",
        "train",
        ("x.parquet is not valid parquet", "download"),
        both(_parquet(), flip("x.parquet", 900)),
        USE_PARQUET,
    ),
    # -- records
    _records("record without completion", [GOOD, {"prompt": "w9"}], "record 2", "completion"),
    _records(
        "record with a number", [{"prompt": 5, "completion": "w5"}], "record 1", "prompt", "int"
    ),
    _records(
        "record too long",
        [GOOD, {"prompt": "w9 ", "completion": "w5 " * 99}],
        "record 2",
        "seq_len",
        "too_long",
    ),
    _records(
        "records without a loss",
        [{"prompt": "w9 ", "completion": ""}] * 3,
        "train.jsonl",
        "completion",
    ),
    _records("records of empty text", [{"text": ""}] * 3, "train.jsonl", "have an empty"),
    _records("records with a label", [{**GOOD, "label": False}], "label", "ignore"),
    Row(
        "column nowhere",
        "train",
        ("question", "prompt"),
        args=(
            "data.train=[{path: train.jsonl, columns: {prompt: question, completion: completion}}]",
        ),
    ),
    Row(
        "format of other columns",
        "train",
        ("chat", "messages"),
        args=("data.train=[{path: train.jsonl, format: chat}]",),
    ),
    Row(
        "template of an open brace",
        "train",
        ("data.train[0].template", "brace"),
        args=("data.train=[{path: train.jsonl, template: 'Q: {prompt'}]",),
    ),
    Row(
        "split of a local file",
        "train",
        ("has no split", "data.train[0].split"),
        lambda r: (
            (r / "d").mkdir() or (r / "d/dataset_dict.json").write_text('{"splits": ["test"]}')
        ),
        ("data.train=[d]",),
    ),
    Row(
        "saved data set of outside files",
        "train",
        ("state.json", "own directory"),
        lambda r: (
            (r / "d").mkdir()
            or (r / "d/state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
        ),
        ("data.train=[d]",),
    ),
    Row(
        "saved data set of a FIFO",
        "train",
        ("state.json", "regular file"),
        lambda r: (r / "d").mkdir() or fifo("d/state.json")(r),
        ("data.train=[d]",),
    ),
    Row(
        "questions without choices",
        "eval",
        ("train.jsonl", "choices"),
        args=("--choices", "train.jsonl"),
    ),
    # -- classification
    Row(
        "label unknown",
        "classify",
        ("labels.jsonl, record 1", "maybe"),
        records("labels.jsonl", {"text": "w9", "label": "maybe"}),
    ),
    Row(
        "label a list",
        "classify",
        ("labels.jsonl, record 1", "label"),
        records("labels.jsonl", {"text": "w9", "label": ["no"]}),
    ),
    Row(
        "labels as truth values",
        "classify",
        ("quotes",),
        args=("data.train=[{path: labels.jsonl, format: classification, labels: [yes, no]}]",),
    ),
    # -- chat
    _chat(
        "chat content parts of images",
        [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "w5"}],
        "image",
    ),
    _chat("chat of no message", [], "messages"),
    _chat("chat messages text", "w5", "messages"),
    _chat("chat without assistant", [USER], "assistant"),
    _chat(
        "chat tool call without name",
        [USER, {"role": "assistant", "tool_calls": [{"function": {}}]}],
        "name",
    ),
    _chat(
        "chat role wizard",
        [USER, {"role": "wizard", "content": "w7"}, {"role": "assistant", "content": "w5"}],
        "record 1, message 2",
        "role wizard",
        "system, developer, user",
    ),
    _chat(
        "chat role misspelt",
        [USER, {"role": "asistant", "content": "w7"}, {"role": "assistant", "content": "w5"}],
        "role asistant",
        "assistant, tool",
    ),
    _chat("chat role empty", [{"role": "", "content": "w7"}, USER], "no role", "message 1"),
    Row(
        "chat preferences",
        "chat",
        ("chosen",),
        records("chat.jsonl", {"prompt": "w9", "chosen": "w5", "rejected": "w6"}),
    ),
    # -- chat templates
    _template("unclosed", "{% for m in messages %}", "endfor"),
    _template("division", "{{ 1 // 0 }}", "zero"),
    _template("empty output", "{% if false %}x{% endif %}", "it writes nothing"),
    _template("memory", "{{ 'x' * 10**10 }}", "memory"),
    _template(
        "endless",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "seconds",
    ),
    _template("number", 5, "must be text", "tokenizer_config.json"),
    _template("range 10**9", "{{ range(10**9) | list }}", "range"),
    _template("recursion", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    # -- conversations with a run
    Row(
        "talk template unclosed",
        "talk",
        ("chat template", "endfor"),
        write("base/chat_template.jinja", "{% for m in messages %}"),
        args=("--template",),
    ),
    Row(
        "talk template that refuses",
        "talk",
        ("chat template", "needs tools"),
        write("base/chat_template.jinja", "{{ raise_exception('needs tools') }}"),
        args=("--template",),
    ),
    Row("talk system without a template", "talk", ("--system",), args=("--system", "w5")),
    Row(
        "talk checkpoint nowhere",
        "talk",
        ("step-000099", "there are steps"),
        args=("--checkpoint", "99"),
    ),
    Row("talk run nowhere", "talk", ("none is no run directory",), args=("--run", "none")),
    Row("talk prompt empty", "talk", ("prompt", "no token"), args=("--prompt", "")),
    Row(
        "talk prompt beyond the positions",
        "talk",
        ("9999 tokens", "max_position"),
        args=("--prompt", "w5 " * 9999),
    ),
    Row(
        "pseudo token unknown",
        "train",
        ("pseudo_token", "[P]"),
        args=("adapter={kind: ptuning, pseudo_token: '[P]'}",),
    ),
]
