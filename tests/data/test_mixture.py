"""Row sets side by side."""

import pytest
import torch

from dist_peft.data.documents import SequenceSet
from dist_peft.data.mixture import SequenceMixture
from dist_peft.data.pieces import take_whole_documents
from tests.support.data_files import documents


def row_set(*lengths: int) -> SequenceSet:
    made = documents([[1] * n for n in lengths])
    return SequenceSet([made], [take_whole_documents(made)], seq_len=16, packed=False)


A, B = row_set(4, 6), row_set(5, 9, 3)


def test_rows_run_through_all_sets() -> None:
    both = SequenceMixture([A, B], ["a", "b"])
    assert len(both) == 5 and both.sequence_counts == [2, 3] and both.task_names == ("a", "b")
    assert (B.task_names, B.sequence_counts, B.find_task_index(2)) == (("",), [3], 0)
    assert [both.find_task_index(i) for i in range(5)] == [0, 0, 1, 1, 1]
    for index, (rows, own) in enumerate([(A, 0), (A, 1), (B, 0), (B, 1), (B, 2)]):
        assert both.num_targets(index) == rows.num_targets(own)
        for mine, theirs in zip(both.get_sequence(index), rows.get_sequence(own), strict=True):
            assert torch.equal(mine, theirs)


def test_what_the_model_must_know_is_the_most_of_any() -> None:
    both = SequenceMixture([A, B], ["a", "b"])
    assert (both.longest, both.seq_len, both.packed) == (9, 16, False)
    assert both.largest_token == max(A.largest_token, B.largest_token)
    assert both.chat_template is None


@pytest.mark.parametrize("other", [[B, A], [A], [A, row_set(5, 9, 4)]])
def test_fingerprint_tells_other_rows(other: list[SequenceSet]) -> None:
    names = [str(i) for i in range(len(other))]
    assert (
        SequenceMixture(other, names).fingerprint != SequenceMixture([A, B], ["0", "1"]).fingerprint
    )
