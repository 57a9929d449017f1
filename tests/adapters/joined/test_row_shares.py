import pytest
import torch

from dist_peft.adapters.joined.row_shares import RowShares
from dist_peft.core.errors import UserError


def test_parts_of_batches_and_of_flattened_ones() -> None:
    shares = RowShares()
    shares.split_batch([(0, 2), (3, 1)], 5)
    assert shares.list_parts(torch.zeros(3, 5, 7), "q") == [(0, 2), (3, 1)]
    assert shares.list_parts(torch.zeros(15, 7), "q") == [(0, 10), (3, 5)]
    shares.split_batch([(0, 2), (3, 1)])
    assert shares.list_parts(torch.zeros(12, 7), "q") == [(0, 8), (3, 4)]


@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 6, 7), (10, 7), (3, 1, 5, 7)])
def test_other_rows_are_refused(shape: tuple[int, ...]) -> None:
    """As of experts, whose rows are in an order of their own."""
    shares = RowShares()
    shares.split_batch([(0, 2), (3, 1)], 5)
    with pytest.raises(UserError, match=r"sweep: mlp\.gate computes .* of a batch of 3 sequences"):
        shares.list_parts(torch.zeros(shape), "mlp.gate")


def test_all_rows_of_one_adapter() -> None:
    shares = RowShares()
    with shares.give_all(1):
        with shares.give_all(0):
            assert shares.only == 0
        assert shares.only == 1
    assert shares.only is None
