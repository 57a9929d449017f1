"""SparseGPT on one matrix: equal to the algorithm written out, row-local, dead columns."""

import pytest
import torch
from torch import Tensor

from dist_peft.quant.sparsegpt import factorize_for_pruning, prune_weight_rows
from dist_peft.quant.sparsity import Sparsity
from tests.support.pruning_runs import prune_sparsegpt_slowly


def draw_inputs(columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    mixed = torch.randn(columns, columns, generator=generator) / columns**0.5
    return torch.randn(300, columns, generator=generator) @ (mixed + torch.eye(columns))


def draw_weight(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def keep(own: Tensor) -> Tensor:
    return own


@pytest.mark.parametrize(
    ("text", "columns"), [("0.5", 150), ("0.3", 40), ("2:4", 64), ("2:3", 150)]
)
def test_equals_the_algorithm_written_out(text: str, columns: int) -> None:
    """Of 150 columns the second block has 22; groups of 3 cross its border."""
    sparsity, inputs = Sparsity.parse(text), draw_inputs(columns).double()
    weight = draw_weight(9, columns)
    factor = factorize_for_pruning(inputs.T @ inputs * 2.0**30)  # the unit does not matter
    found = prune_weight_rows(weight, factor, sparsity, 9, keep)
    expected = prune_sparsegpt_slowly(weight.double(), inputs, sparsity).float()
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    lost = ((weight - found).double() @ inputs.T).square().sum()
    masked = (weight.masked_fill(found == 0, 0) - weight).double() @ inputs.T
    assert lost < 0.9 * masked.square().sum()  # the weights left make up for the others


def test_rows_are_independent_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    sparsity, inputs, weight = Sparsity.parse("2:4"), draw_inputs(32).double(), draw_weight(7, 32)
    factor = factorize_for_pruning(inputs.T @ inputs)
    whole = prune_weight_rows(weight, factor, sparsity, 7, keep)
    assert torch.equal(prune_weight_rows(weight[2:5], factor, sparsity, 7, keep), whole[2:5])
    assert prune_weight_rows(weight[:0], factor, sparsity, 7, keep).shape == (0, 32)
    monkeypatch.setattr("dist_peft.quant.gptq.CHUNK_ELEMENTS", 64)
    assert torch.equal(prune_weight_rows(weight, factor, sparsity, 7, keep), whole)


def test_a_column_that_was_never_active_is_pruned_first() -> None:
    inputs = draw_inputs(24).double()
    inputs[:, 5] = 0
    factor = factorize_for_pruning(inputs.T @ inputs)
    found = prune_weight_rows(draw_weight(4, 24), factor, Sparsity.parse("0.5"), 4, keep)
    assert not found[:, 5].any() and int((found == 0).sum()) == 48
