"""Numbers of a source against those of the sequences that a run makes of it."""

from pathlib import Path

import pytest

from dist_peft.app.source_report import PositionLimit, report_source
from dist_peft.data.documents import load_sequence_set
from tests.support.data_files import byte_tokenizer, data_config, write_jsonl

RECORDS = [{"prompt": "p" * (5 * i), "completion": "x" * i} for i in range(1, 30)]


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_counts_are_those_of_the_run(tmp_path: Path, too_long: str) -> None:
    file = str(write_jsonl(tmp_path / "a.jsonl", RECORDS))
    config = data_config(
        tmp_path / "cache", train=[file], too_long=too_long, seq_len=60, packing=False
    )
    found = report_source(config, "train", 0, byte_tokenizer(), PositionLimit(50, 3))
    rows = load_sequence_set(config, config.train, byte_tokenizer(), name="train")
    used = [rows.num_tokens(i) for i in range(len(rows))]
    assert len(used) == 29 - found.dropped
    lengths = [1 + 5 * i + i + 1 for i in range(1, 30)]
    assert found.lengths.tokens == sum(lengths) and found.targets == sum(range(2, 31))
    assert found.longer == sum(n > 60 for n in lengths)
    if too_long == "drop":
        assert found.cut == 0 and found.beyond_positions == sum(n > 47 for n in used)
    else:
        assert found.cut == found.longer and found.dropped > 0
        assert found.beyond_positions == sum(min(n, 60) > 47 for n in lengths)


def test_plain_text_is_counted_in_chunks(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 100)
    config = data_config(tmp_path / "cache", train=[str(tmp_path / "a.txt")], seq_len=30)
    found = report_source(config, "train", 0, byte_tokenizer(), PositionLimit(20, 0))
    rows = load_sequence_set(config, config.train, byte_tokenizer(), name="train")
    assert found.chunks == 4 == rows.num_documents and found.longer == 1
    assert found.cut == found.dropped == 0 and found.beyond_positions == 1
    assert found.template is None and found.read_as.format == "text"
