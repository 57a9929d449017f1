"""dist-peft validate: facts, problems of every part at once, rendered rows; nothing is written."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub.utils import filter_repo_objects

from dist_peft.app.cli import main
from dist_peft.model import hub_download
from tests.support.data_files import byte_tokenizer, write_jsonl
from tests.support.tiny_models import CONFIGS

Tree = dict[str, Any]


def save_base(directory: Path, **changes: Any) -> str:
    """A tokenizer and a config.json; no weights."""
    byte_tokenizer().save_pretrained(directory)
    config = CONFIGS["llama"]
    config.update({"vocab_size": 300, **changes})
    config.save_pretrained(directory)
    return str(directory)


def save_run(directory: Path, data: Tree, **base: Any) -> list[str]:
    """The command for a configuration with this data section, without a plan of the memory."""
    data = {"cache_dir": str(directory / "cache"), "seq_len": 32, **data}
    tree = {"base": {"path": save_base(directory / "base"), "quant": None, **base}, "data": data}
    (directory / "run.yaml").write_text(yaml.safe_dump(tree))
    return ["validate", "--config", str(directory / "run.yaml"), "--no-plan"]


def test_rows_with_their_loss_mask_and_without_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "one"}] * 3)
    command = save_run(tmp_path, {"train": [str(file)], "packing": False})
    assert main([*command, "--rows", "2"]) == 0
    printed = capsys.readouterr().out
    assert "documents                   3, 18 tokens" in printed
    assert "in the loss                 12 tokens, 66.7 %" in printed
    assert "llama, 2 blocks of width 64, 64 positions" in printed
    assert "no weights are here" in printed and printed.rstrip().endswith(
        "ready to train: 1 warning"
    )
    assert printed.count("<s>p[[one</s>]]") == 2
    assert main([*command, "--rows", "1", "--color", "always"]) == 0
    assert "\x1b[2m<s>p\x1b[0m\x1b[1;32mone</s>\x1b[0m" in capsys.readouterr().out
    write_jsonl(file, [{"prompt": "p", "completion": "one", "label": False}])
    assert main(command) == 2
    captured = capsys.readouterr()
    assert "a.jsonl, record 1: column label is False" in captured.err
    assert "problem: " in captured.out and "not ready: 1 problem" in captured.out


def test_all_problems_are_listed_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A target that matches nothing, a missing file, an unreadable one; the rest is described."""
    good = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "one"}])
    bad = tmp_path / "b.jsonl"
    bad.write_text("{")
    data = {"train": [str(good), "nowhere.jsonl"], "eval": [str(bad)]}
    command = save_run(tmp_path, data)
    before = sorted(tmp_path.iterdir())
    assert main([*command, "adapter.target_modules=[q_prj]", "--json"]) == 2
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert [source["key"] for source in report["sources"]] == ["data.train[0]"]
    assert report["model"] is None and report["run"] is None
    assert "run.yaml has 3 problems: (1) " in captured.err
    for words in ("q_prj", "nowhere.jsonl does not exist", "b.jsonl, line 1 is not valid JSON"):
        assert words in captured.err and any(words in text for text in report["problems"])
    assert [p for p in sorted(tmp_path.iterdir()) if p.name != "cache"] == before


def test_lengths_cut_dropped_and_beyond_the_positions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Documents of 11, 51, 91 and 130 tokens: the last has its targets beyond the 80th."""
    records = [{"prompt": "p", "completion": "x" * (8 + 40 * i)} for i in range(3)]
    records.append({"prompt": "p" * 120, "completion": "x" * 8})
    file = write_jsonl(tmp_path / "a.jsonl", records)
    data = {"train": [str(file)], "seq_len": 80, "too_long": "truncate"}
    assert main([*save_run(tmp_path, data), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (source,) = report["sources"]
    lengths = source["lengths"]
    assert [lengths[key] for key in ("shortest", "longest", "tokens")] == [11, 130, 283]
    assert sum(each["documents"] for each in lengths["histogram"]) == 4
    assert {64, 80} <= {each["last"] for each in lengths["histogram"]}
    assert [source[key] for key in ("longer", "cut", "dropped")] == [2, 2, 1]
    assert source["beyond_positions"] == 2  # 80 of 64 positions each, one of which is dropped later
    assert source["targets"] == 9 + 49 + 89 + 9 and source["target_share"] == 156 / 283
    assert any("needs 80 positions" in text for text in report["warnings"])
    assert main([*save_run(tmp_path, {**data, "too_long": "drop"})]) == 0
    assert "2 of more than data.seq_len 80: 2 dropped" in capsys.readouterr().out
    assert main([*save_run(tmp_path, {**data, "too_long": "error"})]) == 2
    captured = capsys.readouterr()
    assert "2 of more than data.seq_len 80: refused" in captured.out
    assert "more than data.seq_len 80 (2 records are too long)" in captured.err


def test_split_template_and_guessed_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(10)]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    files = [
        str(write_jsonl(tmp_path / "a.jsonl", pairs)),
        str(
            write_jsonl(
                tmp_path / "b.jsonl", [{"messages": [*turns, *turns][: 2 * i]} for i in (1, 2)]
            )
        ),
    ]
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m['role'] }}>{% generation %}{{ m['content'] + eos_token }}"
        "{% endgeneration %}{% endfor %}"
    )
    data = {"train": files, "val_split": 0.2, "chat_template": str(template), "seq_len": 64}
    assert main([*save_run(tmp_path, data), "--rows", "1"]) == 0
    printed = capsys.readouterr().out
    assert "completion (prompt: question, completion: answer), by their names" in printed
    assert "chat template               data.chat_template, which marks" in printed
    assert "held out                    2 sequences" in printed
    assert "--- data.eval[1] row 0" in printed


def test_memory_is_compared_with_the_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "one"}])
    command = [part for part in save_run(tmp_path, {"train": [str(file)]}) if part != "--no-plan"]
    assert main([*command, "--gpu-memory", "40MiB", "--html", str(tmp_path / "a.html")]) == 3
    printed = capsys.readouterr().out
    assert "40.00 MiB: DOES NOT FIT" in printed and "optimizer state" in printed
    page = (tmp_path / "a.html").read_text()
    assert "DOES NOT FIT" in page and "<script" not in page and "http" not in page
    assert "[[" not in page and "<mark>one&lt;/s&gt;</mark>" in page


def test_control_characters_of_the_data_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"prompt": "p\x1b[2J", "completion": "<b>\x07"}
    file = write_jsonl(tmp_path / "a.jsonl", [record])
    page = tmp_path / "page.html"
    assert main([*save_run(tmp_path, {"train": [str(file)]}), "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "p\\x1b[2J[[<b>\\x07</s>]]" in printed and "\x1b" not in printed
    assert "&lt;b&gt;" in page.read_text() and page.stat().st_mode & 0o77 == 0


def test_wrong_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}])
    command = save_run(tmp_path, {"train": [str(file)]})
    for args, words in (
        (["--rows", "-1"], "--rows -1: give a number of 0 or more"),
        (["--html", str(tmp_path)], "ends in .html"),
        (["--html", str(tmp_path / "run.yaml")], "ends in .html"),
        (["--html", str(tmp_path / "no" / "a.html")], "there is no directory"),
        (["--gpu-memory", "much"], "no amount of memory"),
    ):
        assert main([*command, *args]) == 2
        assert words in capsys.readouterr().err


def test_variants_of_a_record_are_shown_under_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "synonyms.txt").write_text("good: fine\n")
    augment = {"kind": "eda", "synonyms": str(tmp_path / "synonyms.txt"), "num_aug": 2}
    augment |= {"alpha_ri": 0, "alpha_rs": 0, "p_rd": 0}
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "good ", "completion": "good"}] * 2)
    data = {"packing": False, "train": [{"path": str(file), "augment": augment}]}
    assert main([*save_run(tmp_path, data), "--rows", "1"]) == 0
    printed = capsys.readouterr().out
    assert "documents                   6, 66 tokens" in printed
    lines = printed.splitlines()
    begin = lines.index("--- data.train[0] row 0 (epoch 0): 11 tokens")
    assert lines[begin : begin + 6] == [
        "--- data.train[0] row 0 (epoch 0): 11 tokens",
        "<s>good [[good</s>]]",
        "--- data.train[0] row 2 (epoch 1): 11 tokens",
        "<s>fine [[good</s>]]",
        "--- data.train[0] row 4 (epoch 2): 11 tokens",
        "<s>fine [[good</s>]]",
    ]
    assert main(save_run(tmp_path, {**data, "eval": data["train"]})) == 2
    assert "eval[0].augment: held-out records are measured as they are" in capsys.readouterr().err


def test_classification_shows_texts_and_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for name, label in (("one", "no"), ("two", "b")):
        records = [{"text": f"{name}{i}", "label": label} for i in range(3)]
        files.append(str(write_jsonl(tmp_path / f"{name}.jsonl", records)))
    labels = (["yes", "no"], ["a", "b"])
    train = [
        {"path": file, "format": "classification", "labels": names}
        for file, names in zip(files, labels, strict=True)
    ]
    held_out = [{"path": files[1], "format": "classification", "name": "two"}]
    command = save_run(tmp_path, {"train": train, "eval": held_out}, head="classifier")
    assert main([*command, "--rows", "1"]) == 0
    printed = capsys.readouterr().out
    assert "labels                      yes 0, no 3" in printed
    assert "--- data.train[0] row 0: 5 tokens, label no\n<s>one0\n" in printed
    assert printed.count("row 0: 5 tokens, label b\n<s>two0\n") == 2
    assert "in the loss  " not in printed


def test_no_weights_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_base(tmp_path / "base")
    asked: list[list[str]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path / "base")

    monkeypatch.setattr(hub_download, "snapshot_download", download)
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}])
    data = {"train": [str(file)], "cache_dir": str(tmp_path / "cache")}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"base": {"path": "some/model"}, "data": data}))
    assert main(["validate", "--config", str(config), "--no-plan"]) == 0
    files = ["config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]
    shards = ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"]
    for patterns in asked:
        assert sorted(filter_repo_objects([*files, *shards], allow_patterns=patterns)) == sorted(
            files
        )


def test_output_that_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}])
    command = save_run(tmp_path, {"train": [str(file)]})
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(command) == 0
