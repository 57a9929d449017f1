import pytest
import torch
from torch import Tensor

from dist_peft.adapters.lora.eva import (
    compute_eva_components,
    redistribute_ranks,
    with_ones_column,
)
from tests.support.matrices import decaying


def inputs() -> Tensor:
    """A few strong directions around a mean that is not zero."""
    return decaying(40, 12) + torch.arange(12.0)


def test_components_are_those_of_the_centered_inputs() -> None:
    x = inputs()
    wide = with_ones_column(x)
    components, shares = compute_eva_components(wide.T @ wide, 5)
    centered = (x - x.mean(0)).double()
    _, values, right = torch.linalg.svd(centered, full_matrices=False)
    signs = (components * right[:5]).sum(1, keepdim=True).sign()
    torch.testing.assert_close(components, signs * right[:5], rtol=0, atol=1e-6)
    torch.testing.assert_close(shares, values[:5].square() / centered.square().sum())
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_too_few_or_constant_inputs() -> None:
    few = with_ones_column(inputs()[:5])
    with pytest.raises(ValueError, match="5 inputs are too few for 5 components"):
        compute_eva_components(few.T @ few, 5)
    same = with_ones_column(torch.ones(9, 4))
    with pytest.raises(ValueError, match="do not vary"):
        compute_eva_components(same.T @ same, 2)


def test_ranks_go_to_what_explains_most() -> None:
    shares = {"a": [0.5, 0.3, 0.1, 0.05], "b": [0.2, 0.2, 0.2, 0.2], "c": [0.04, 0.03, 0.02, 0.0]}
    assert redistribute_ranks(shares, {"a": 2, "b": 2, "c": 2}) == {"a": 2, "b": 4, "c": 0}
    assert redistribute_ranks(shares, {"a": 1, "b": 1, "c": 1}) == {"a": 2, "b": 1, "c": 0}
