"""Questions as rows."""

from pathlib import Path

import pytest

from dist_peft.core.errors import UserError
from dist_peft.data.loader import TokenLoader
from dist_peft.data.multiple_choice import ChoiceQuestion, ChoiceSequences, read_choice_questions
from dist_peft.model.hub import Tokenizer, load_tokenizer
from tests.support.tiny_runs import save_base

GOOD = '{"prompt": "w5 w6", "choices": ["w7", "w8 w9"], "answer": 1}'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_base(tmp_path_factory.mktemp("base")), False)


def test_reading(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(f"{GOOD}\n\n{GOOD}\n")
    assert (
        read_choice_questions(tmp_path / "q.jsonl")
        == [ChoiceQuestion("w5 w6", ("w7", "w8 w9"), 1)] * 2
    )


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"prompt": "a", "choices": ["b", "c"]}',
        '{"prompt": "a", "choices": ["b"], "answer": 0}',
        '{"prompt": "a", "choices": ["b", ""], "answer": 0}',
        '{"prompt": 1, "choices": ["b", "c"], "answer": 0}',
        '{"prompt": "a", "choices": ["b", "c"], "answer": 2}',
        '{"prompt": "a", "choices": ["b", "c"], "answer": true}',
        '{"prompt": "a", "choices": "bc", "answer": 0}',
    ],
)
def test_no_question(tmp_path: Path, line: str) -> None:
    (tmp_path / "q.jsonl").write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(UserError, match="line 2: not a question of the form"):
        read_choice_questions(tmp_path / "q.jsonl")


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no question"):
        read_choice_questions(tmp_path / "q.jsonl")
    with pytest.raises(UserError, match="cannot read questions"):
        read_choice_questions(tmp_path / "absent.jsonl")


def test_only_the_choice_counts(tokenizer: Tokenizer) -> None:
    rows = ChoiceSequences([ChoiceQuestion("w5 w6", ("w7", "w8 w9"), 1)], tokenizer, 8)
    tokens, labels, positions = rows.get_sequence(1)
    assert tokens.tolist() == [5, 6, 8, 9] and positions.tolist() == [0, 1, 2, 3]
    assert labels.tolist() == [-100, 8, 9, -100]
    assert [rows.num_targets(i) for i in range(len(rows))] == [1, 2]
    assert (rows.longest, rows.largest_token) == (4, 9)


def test_every_rank_has_as_many_batches(tokenizer: Tokenizer) -> None:
    rows = ChoiceSequences([ChoiceQuestion("w5", ("w7", "w8", "w9"), 1)], tokenizer, 8)
    found = []
    for rank in range(2):
        loader = TokenLoader(
            rows,
            global_batch=2,
            micro_batch=1,
            seed=0,
            shuffle=False,
            data_rank=rank,
            data_size=2,
            seq_len=8,
            pad_id=0,
        )
        found.append([batch.sample_ids.tolist() for batch in loader.load_all_sequential()])
    assert found == [[[0], [2]], [[1], [-1]]]


def test_too_long(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="question 0 has 4 tokens with its answer 'w8 w9', more"):
        ChoiceSequences([ChoiceQuestion("w5 w6", ("w7", "w8 w9"), 1)], tokenizer, 3)
