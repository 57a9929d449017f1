import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dist_peft.core.config.run import DataSource
from dist_peft.core.errors import UserError
from dist_peft.data.chat import make_default_chat_template
from dist_peft.data.documents import (
    SequenceSet,
    fit_documents,
    load_sequence_set,
    load_sequence_sets,
)
from dist_peft.data.packing import IGNORE
from dist_peft.data.pieces import count_piece_targets
from dist_peft.data.sequence_text import format_sequence
from tests.support.data_files import byte_tokenizer, data_config, documents, write_jsonl


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


class Make:
    """Rows of records written to a file."""

    def __init__(self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tmp_path = tmp_path
        self.tokenizer = tokenizer

    def __call__(self, *files: list[dict[str, Any]], **config: Any) -> SequenceSet:
        sources = [
            DataSource(path=str(write_jsonl(self.tmp_path / f"{i}.jsonl", records)))
            for i, records in enumerate(files)
        ]
        settings = data_config(self.tmp_path / "cache", **config)
        return load_sequence_set(settings, sources, self.tokenizer, name="train")

    def shown(self, rows: SequenceSet) -> list[str]:
        return [format_sequence(rows, i, self.tokenizer) for i in range(len(rows))]


@pytest.fixture
def make(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Make:
    return Make(tmp_path, tokenizer)


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def check_consistent(rows: SequenceSet) -> None:
    """What is counted ahead is what the rows hold, and labels never leave their document."""
    for i in range(len(rows)):
        tokens, labels, positions = rows.get_sequence(i)
        assert tokens.dtype == labels.dtype == positions.dtype == torch.long
        assert len(tokens) == len(labels) == len(positions) == rows.num_tokens(i) <= rows.seq_len
        counted = labels != IGNORE
        assert int(counted.sum()) == rows.num_targets(i) > 0
        last = torch.cat([positions[1:] == 0, torch.tensor([True])])
        assert not (counted & last).any()
        assert torch.equal(labels[:-1][counted[:-1]], tokens[1:][counted[:-1]])


def test_unpacked_rows_are_the_documents_in_order(make: Make) -> None:
    rows = make([pair("p", "one"), pair("qr", "two")], [{"text": "three"}], packing=False)
    check_consistent(rows)
    assert make.shown(rows) == ["<s>p[[one</s>]]", "<s>qr[[two</s>]]", "<s>[[three</s>]]"]
    assert not rows.packed
    assert rows.total_targets == 4 + 4 + 6


def test_packed_rows_join_documents_of_all_sources(make: Make) -> None:
    rows = make([pair("p", "one"), pair("p", "x" * 20)], [{"text": "three"}], seq_len=24)
    check_consistent(rows)
    assert make.shown(rows) == [
        "<s>p[[one</s>]] || <s>[[three</s>]]",
        "<s>p[[" + "x" * 20 + "</s>]]",
    ]
    assert rows.packed
    assert rows.num_documents == 3


def test_packing_keeps_every_label(make: Make) -> None:
    records = [pair("p" * (i % 7), "c" * (i % 11)) for i in range(50)]
    packed, plain = make(records, seq_len=32), make(records, seq_len=32, packing=False)
    check_consistent(packed)
    check_consistent(plain)
    assert len(packed) < len(plain)
    assert packed.total_targets == plain.total_targets

    def documents(rows: SequenceSet) -> list[str]:
        return sorted(part for row in make.shown(rows) for part in row.split(" || "))

    assert documents(packed) == documents(plain)


def test_fingerprint_is_of_what_rows_hold(make: Make) -> None:
    records = [pair("p", "one"), pair("q", "two")]
    first = make(records).fingerprint
    assert make(records).fingerprint == first
    assert make(records, packing=False).fingerprint != first
    assert make(records[::-1]).fingerprint != first
    assert make(records, loss_on="all").fingerprint != first


# -- too long ------------------------------------------------------------------------------------

LONG = [pair("p", "ok"), pair("p", "c" * 20), pair("p" * 20, "c"), pair("p", "c" * 30)]


def test_too_long_is_refused_with_the_mends(make: Make) -> None:
    with pytest.raises(UserError) as error:
        make(LONG, seq_len=8)
    assert str(error.value) == (
        f"{make.tmp_path}/0.jsonl, record 2 has 23 tokens, more than data.seq_len 8 (3 records are "
        "too long). Raise data.seq_len (the longest has 33), or set data.too_long to truncate or "
        "drop"
    )
    with pytest.raises(UserError, match="too_long: split is for plain text only"):
        make(LONG, seq_len=8, too_long="split")


def test_drop(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    rows = make(LONG, seq_len=8, too_long="drop")
    assert make.shown(rows) == ["<s>p[[ok</s>]]"]
    assert "data.train[0]: dropped 3 of 4 records longer than data.seq_len 8" in caplog.text
    with pytest.raises(UserError, match=r"data.train: no record is left .*is drop.*seq_len"):
        make(LONG[1:], seq_len=8, too_long="drop")


def test_truncate_drops_what_has_nothing_left_to_learn(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    rows = make(LONG, seq_len=8, too_long="truncate", packing=False)
    check_consistent(rows)
    assert make.shown(rows) == ["<s>p[[ok</s>]]", "<s>p[[cccccc]]", "<s>p[[cccccc]]"]
    assert "cut 3 of 4 records to data.seq_len 8 tokens" in caplog.text
    assert "dropped 1 of these" in caplog.text


@pytest.mark.parametrize("too_long", ["error", "truncate", "drop", "split"])
def test_text_is_always_cut_into_windows(
    make: Make, caplog: pytest.LogCaptureFixture, too_long: str
) -> None:
    rows = make([{"text": "abcdefghijklmnop"}], seq_len=8, packing=False, too_long=too_long)
    check_consistent(rows)
    # abcdefgh... is a|bc|de|f|...: 14 tokens, bos and eos make two windows of 8
    assert make.shown(rows) == ["<s>[[abcdefghi]]", "j[[klmnop</s>]]"]
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_last_window_of_one_token_is_left_out(make: Make) -> None:
    rows = make([{"text": "xxxxxxx"}, {"text": "x"}], seq_len=8, packing=False)
    assert make.shown(rows) == ["<s>[[xxxxxxx]]", "<s>[[x</s>]]"]


# -- nothing to learn ----------------------------------------------------------------------------


def test_conversations_without_assistant_are_counted_and_left_out(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    good = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    records = [{"messages": good}, {"messages": good[:1]}, {"messages": good[:1]}]
    assert len(make(records, packing=False)) == 1
    assert "left out 2 of 3 records without a token" in caplog.text
    assert "0.jsonl, record 2: a conversation needs an assistant turn" in caplog.text
    with pytest.raises(UserError, match=r"record 1 has no token .*nor has any other"):
        make(records[1:])
    assert len(make(records, loss_on="all", packing=False)) == 3


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "p", "completion": " "},
        {"prompt": "p", "completion": "c", "weight": 0},
        {"prompt": "p", "completion": "c", "train": False},
    ],
)
def test_records_that_are_not_to_be_trained_on(make: Make, record: dict[str, Any]) -> None:
    rows = make([pair("p", "ok"), record, pair("q", "ok")], packing=False)
    assert make.shown(rows) == ["<s>p[[ok</s>]]", "<s>q[[ok</s>]]"]


def test_system_and_history_of_alpaca_are_trained_on(make: Make) -> None:
    record = {"instruction": "i", "output": "o", "system": "S", "history": [["q", "a"]]}
    assert make.shown(make([record])) == [
        "<s>S\n\n### Instruction:\nq\n\n### Response:[[a</s>]]\n\n### Instruction:\ni\n\n"
        "### Response:[[o</s>]]"
    ]


def test_what_is_left_out_is_not_too_long_as_well(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Counts of long records are of those that are left; each record is counted once."""
    user = {"role": "user", "content": "u" * 30}
    answer = {"role": "assistant", "content": "a"}
    records = [{"messages": [user]}, {"messages": [{**user, "content": "u"}, answer]}]
    assert len(make(records, seq_len=32, packing=False)) == 1
    long = {"messages": [{**user, "content": "u"}, {**answer, "content": "a" * 40}]}
    for too_long in ("truncate", "drop"):
        make([*records, long], seq_len=32, packing=False, too_long=too_long)
    assert "cut 1 of 2 records" in caplog.text and "of these" not in caplog.text
    assert "dropped 1 of 2 records longer" in caplog.text
    with pytest.raises(UserError, match=r"record 3 has .* tokens, more than data.seq_len 32"):
        make([*records, long], seq_len=32)


def test_empty_text_without_bos_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Windows of the other texts stay, the second and later ones, too."""
    make = Make(tmp_path, byte_tokenizer(bos=False))
    assert len(make([{"text": "xyz" * 8}, {"text": ""}], seq_len=8, packing=False)) == 3
    assert "left out 1 of 2 records, which have an empty text" in caplog.text


def test_no_source(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"data.eval names no source"):
        load_sequence_set(data_config(tmp_path), [], tokenizer, name="eval")


# -- against slow references ---------------------------------------------------------------------


@given(
    st.lists(st.lists(st.booleans(), min_size=2, max_size=30), min_size=1, max_size=12),
    st.integers(8, 20),
    st.booleans(),
)
def test_windows_and_targets_against_slicing(
    masks: list[list[bool]], seq_len: int, packing: bool
) -> None:
    made = documents([[1] * len(m) for m in masks], is_text=True)
    counted = np.asarray([int(b) for m in masks for b in m], dtype=np.uint8)
    config = data_config(Path("unused"), seq_len=seq_len, packing=packing)
    pieces = fit_documents(made, config, "k")
    expected = [
        (start, min(start + seq_len, stop))
        for begin, stop in zip(made.offsets[:-1].tolist(), made.offsets[1:].tolist(), strict=True)
        for start in range(begin, stop, seq_len)
        if min(start + seq_len, stop) - start > 1
    ]
    assert list(zip(pieces.start, pieces.start + pieces.length, strict=True)) == expected

    targets = count_piece_targets([replace(made, mask=counted)], pieces)
    assert targets.tolist() == [int(counted[a + 1 : b].sum()) for a, b in expected]


def test_what_the_model_must_know(make: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = make([{"text": "abcab"}, {"text": "a"}], seq_len=16)
    assert rows.longest == len("<abcab>") - 1  # "bc" is one token
    assert rows.largest_token == tokenizer.eos_token_id
    assert rows.chat_template is None


def test_template_of_conversations_written_without_one(make: Make) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = make([{"text": "abcab"}], [chat], seq_len=64)
    assert rows.chat_template == make_default_chat_template(True)


def test_rows_of_each_source_by_itself(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, make: Make
) -> None:
    """Packing never puts records of two sources into one row."""
    files = [[pair("a", "b")], [pair("c", "d"), pair("e", "f")]]
    together = make(*files, packing=True)
    sources = [DataSource(path=str(tmp_path / f"{i}.jsonl")) for i in range(2)]
    settings = data_config(tmp_path / "cache", packing=True)
    apart = load_sequence_sets(settings, sources, tokenizer, name="train")
    assert (len(together), [len(rows) for rows in apart]) == (1, [1, 1])
    assert [rows.num_documents for rows in apart] == [1, 2]
    shown = [text for rows in apart for text in make.shown(rows)]
    assert " || ".join(shown) == make.shown(together)[0]
