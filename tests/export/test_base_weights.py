"""Tensors of a base: names, stems and rows of the linear that they belong to."""

import torch

from dist_peft.core.span import Span
from dist_peft.export.base_weights import BaseWeight, name_by_modules
from dist_peft.store.writer import TensorSpec


def test_a_tensor_that_belongs_to_no_linear() -> None:
    info = TensorSpec("model.norm.weight", torch.float32, (5,))
    weight = BaseWeight(info, "model.norm.weight", None, "model.norm.weight")
    assert not weight.is_block_linear and weight.codec is None
    assert (weight.name_stem, weight.module_path, weight.num_rows) == ("model.norm",) * 2 + (5,)


def test_rows_of_experts_that_are_stored_together() -> None:
    """Tensor [3 experts, 4, 7] begins at row 8 of the stack: an expert is 4 of its rows."""
    info = TensorSpec("experts.up", torch.float32, (3, 4, 7))
    weight = BaseWeight(info, "experts.weight", None, "experts.up", first=8)
    assert weight.span_in_linear(Span(1, 3)) == Span(12, 20)
    assert (weight.num_rows, weight.num_columns) == (3, 7)


def test_tensors_outside_of_experts_are_named_by_their_path() -> None:
    info = TensorSpec("block_sparse_moe.gate.weight", torch.float32, (3, 4))
    weight = BaseWeight(info, "mlp.gate.weight", None, "block_sparse_moe.gate.weight")
    (named,) = name_by_modules([weight])
    assert named.written == "mlp.gate.weight" and named.name == weight.name
    assert not weight.is_expert
