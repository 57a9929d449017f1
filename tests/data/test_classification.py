"""Labelled files to batches; the GLUE files keep every line, whatever quotes they hold."""

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_peft.core.errors import UserError
from dist_peft.data.classification import (
    LabelledBatch,
    LabelledLoader,
    LabelledSequences,
    load_labelled_sequences,
)
from dist_peft.data.mixture import SequenceMixture
from dist_peft.model.hub import load_tokenizer
from tests.support.classification_runs import save_classifier_base, save_pairs, source
from tests.support.data_files import data_config


class Load:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tokenizer = load_tokenizer(save_classifier_base(directory / "base", "bert"))

    def rows(self, *sources: dict[str, Any], **config: Any) -> list[LabelledSequences]:
        found = data_config(
            self.directory / "cache", **{"train": list(sources), "seq_len": 32, **config}
        )
        return load_labelled_sequences(found, found.train, self.tokenizer, name="train")


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return Load(tmp_path)


def test_rows_of_two_tasks(load: Load, tmp_path: Path) -> None:
    letters = ["a", "b"]
    first = source(save_pairs(tmp_path / "one.tsv", 3))
    second = source(save_pairs(tmp_path / "two.tsv", 5, letters), labels=letters)
    one, two = load.rows(first, second)
    assert (len(one), len(two), one.longest, one.num_targets(2)) == (3, 5, 11, 1)
    tokens, target, types = one.get_sequence(0)
    assert tokens.tolist() == [1, 10, 11, 2, 9, 11, 2] and target.tolist() == [0, 0, 2, -1]
    assert types.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert two.get_sequence(1)[1].tolist() == [3, 2, 4, -1]
    with pytest.raises(IndexError):
        one.get_sequence(3)
    assert one.fingerprint != load.rows(source(save_pairs(tmp_path / "one.tsv", 2)))[0].fingerprint

    mixture = SequenceMixture([one, two], ["one", "two"])
    loader = LabelledLoader(
        mixture,
        global_batch=3,
        micro_batch=2,
        seed=0,
        shuffle=False,
        data_rank=1,
        data_size=2,
        seq_len=32,
        pad_id=0,
    )
    (batch,), targets = loader.load_step(1)  # rows 3, 4, 5: this rank has the second micro-batch
    assert isinstance(batch, LabelledBatch) and targets == 3
    assert batch.sample_ids.tolist() == [5]
    assert batch.labels.tolist() == [[2]] and batch.ranges.tolist() == [[2, 4]]
    assert batch.attention_mask.sum(1).tolist() == [len(two.get_sequence(2)[0])]
    filler = loader._collate_rows([4, -1])
    assert filler.labels.tolist() == [[3], [-100]] and filler.ranges.tolist() == [[2, 4], [0, 1]]
    assert filler.attention_mask.sum(1).tolist() == [len(two.get_sequence(1)[0]), 1]
    assert filler.input_ids.shape == filler.token_types.shape == (2, 16)
    assert torch.equal(filler.token_types[0, :9], two.get_sequence(1)[2])


def test_numbers_and_truth_values_of_json(load: Load, tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    records = [{"text": "w10", "label": label} for label in (0, "1", True, 2.5)]
    file.write_text("\n".join(map(json.dumps, records)))
    labels = ["0", "1", "true", "2.5"]
    (rows,) = load.rows({"path": str(file), "format": "classification", "labels": labels})
    assert [int(rows.get_sequence(i)[1][0]) for i in range(4)] == [0, 1, 2, 3]


def test_refused(load: Load, tmp_path: Path) -> None:
    file = save_pairs(tmp_path / "f.tsv", 4)
    message = r"f.tsv, record 2: column answer is 'yes', which is none of the labels no, maybe"
    with pytest.raises(UserError, match=message):
        load.rows(source(file, labels=["no", "maybe"]))
    with pytest.raises(UserError, match="record 1 has no column third"):
        load.rows(source(file, columns={"text": "first", "text_pair": "third", "label": "answer"}))
    with pytest.raises(UserError, match="has no column label; its columns are id, first"):
        load.rows(source(file, columns={"text": "first"}))
    with pytest.raises(UserError, match="pair is not a role of format classification"):
        load.rows(source(file, columns={"pair": "first"}))
    with pytest.raises(UserError, match=r"record 2 has 9 tokens, more than data.seq_len 8"):
        load.rows(source(file), seq_len=8)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": "w10 " * 20, "label": "no"}))
    with pytest.raises(UserError, match="no record is left"):
        load.rows(source(long, columns={}), seq_len=8, too_long="drop")


def test_too_long(load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = save_pairs(tmp_path / "f.tsv", 4)
    with caplog.at_level(logging.WARNING):
        (kept,) = load.rows(source(file), seq_len=8, too_long="drop")
        (cut,) = load.rows(source(file), seq_len=8, too_long="truncate")
    assert len(kept) == 1 and len(cut) == 4 and cut.longest == 8
    assert int(kept.get_sequence(0)[1][0]) == 0 and int(cut.get_sequence(3)[1][0]) == 1
    assert "dropped 3 of 4 records" in caplog.text and "cut 3 of 4 records" in caplog.text


@pytest.mark.data
def test_glue_files(load: Load, shared_data: Path) -> None:
    """As many rows as lines, and each with the label of its line."""
    rte = {"text": "sentence1", "text_pair": "sentence2", "label": "label"}
    mrpc = {"text": "#1 String", "text_pair": "#2 String", "label": "Quality"}
    entailment = ["entailment", "not_entailment"]
    for path, columns, labels, count in (
        ("rte/train.tsv", rte, entailment, 2490),
        ("rte/dev.tsv", rte, entailment, 277),
        ("mrpc/msr-para-train.tsv", mrpc, ["0", "1"], 3576),
        ("mrpc/msr-para-val.tsv", mrpc, ["0", "1"], 500),
    ):
        file = shared_data / path
        (rows,) = load.rows(source(file, columns=columns, labels=labels), seq_len=4096)
        assert len(rows) == count
        with file.open(encoding="utf-8-sig") as lines:
            found = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
        named = [labels[int(rows.get_sequence(i)[1][0])] for i in range(count)]
        assert named == [record[columns["label"]] for record in found]
