from pathlib import Path

import pytest
import transformers as tf

from dist_peft.core.errors import UserError
from dist_peft.data.examples import LabelledExample
from dist_peft.data.files import RecordPlace
from dist_peft.data.pairs import PairEncoder
from dist_peft.model.hub import load_tokenizer
from tests.support.classification_runs import save_classifier_base
from tests.support.data_files import byte_tokenizer

PLACE = RecordPlace("f.tsv", 1)
PAIR = LabelledExample("w10 w11 w12 w13", "w20 w21", 0)


@pytest.fixture
def tokenizer(tmp_path: Path) -> tf.PreTrainedTokenizerFast:
    found: tf.PreTrainedTokenizerFast = load_tokenizer(save_classifier_base(tmp_path, "bert"))
    return found


def test_as_the_tokenizer_builds_pairs(tokenizer: tf.PreTrainedTokenizerFast) -> None:
    encoder = PairEncoder(tokenizer, None)
    (pair, single) = encoder.encode_examples(
        [PAIR, LabelledExample("w10", None, 1)], [PLACE, PLACE]
    )
    assert pair[0].tolist() == [1, 10, 11, 12, 13, 2, 20, 21, 2]
    assert pair[1].tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert single[0].tolist() == [1, 10, 2] and single[1].tolist() == [0, 0, 0]
    assert encoder.user_notes == []


@pytest.mark.parametrize("window", [5, 6, 8, 9])
def test_cut_as_transformers_cuts(tokenizer: tf.PreTrainedTokenizerFast, window: int) -> None:
    """The longer text loses its last words first."""
    encoder = PairEncoder(tokenizer, window)
    ((tokens, types),) = encoder.encode_examples([PAIR], [PLACE])
    expected = tokenizer(
        PAIR.text,
        PAIR.text_pair,
        truncation="longest_first",
        max_length=window,
        return_token_type_ids=True,
    )
    assert tokens.tolist() == expected["input_ids"] and types.tolist() == expected["token_type_ids"]
    assert len(tokens) == window
    cut = [f"cut 1 of 1 records to data.seq_len {window} tokens"]
    assert encoder.user_notes == (cut if window < 9 else [])


def test_nothing_to_read() -> None:
    encoder = PairEncoder(byte_tokenizer(bos=False), None)
    with pytest.raises(UserError, match=r"f.tsv, record 1 has no token"):
        encoder.encode_examples([LabelledExample("", None, 0)], [PLACE])


def test_blank_texts_are_nothing_to_read(tokenizer: tf.PreTrainedTokenizerFast) -> None:
    """An encoder's special tokens alone would be trained on; one text of a pair may be blank."""
    encoder = PairEncoder(tokenizer, None)
    encoder.encode_examples([LabelledExample("", "w10", 0)], [PLACE])
    with pytest.raises(UserError, match=r"f.tsv, record 1 has no token"):
        encoder.encode_examples([LabelledExample(" ", "", 0)], [PLACE])
