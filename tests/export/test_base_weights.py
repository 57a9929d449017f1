"""Tensors of a base: names, stems and rows of the linear that they belong to."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from dist_peft.core.span import Span
from dist_peft.export.base_weights import (
    BaseWeight,
    join_parts,
    name_as_linears,
    name_by_modules,
    split_experts,
    split_stacks,
)
from dist_peft.model.experts import ExpertStack
from dist_peft.model.frozen_linear import StackPiece
from dist_peft.quant.codec import RawCodec
from dist_peft.store.writer import TensorSpec
from tests.support.export_runs import make_run, stacked_mixture


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


def test_stacks_are_split_by_expert_and_by_projection() -> None:
    stack = ExpertStack(3, 7, 4, RawCodec(torch.float32), "file", "meta")
    stack.pieces = (StackPiece("experts.gate_up_proj", Span(0, 12)),)
    info = TensorSpec("experts.gate_up_proj", torch.float32, (3, 4, 7))
    weight = BaseWeight(info, "experts.gate_up_proj.weight", stack, "experts.gate_up_proj")
    experts = split_experts([weight])
    assert [part.span_in_linear(Span(0, 4)) for part in experts] == [
        Span(0, 4),
        Span(4, 8),
        Span(8, 12),
    ]
    halves = split_experts([weight], halves=True)
    assert [part.find_expert() for part in halves] == [
        (expert, name) for expert in range(3) for name in ("gate_proj", "up_proj")
    ]
    assert len({part.name for part in halves}) == 6
    apart = BaseWeight(info, "norm.weight", None, "norm.weight")
    assert split_experts([apart]) == [apart]


def test_rows_of_linears_that_a_transposed_stack_has(tmp_path: Path) -> None:
    """Tensor [experts, in, out], of which an expert's gate is the first half of the columns."""
    run = make_run(tmp_path / "run", None, config=stacked_mixture("llama4_text"))
    files = load_file(run.directory / "model.safetensors")
    with run.job(tmp_path / "out", chunk_bytes=64 * 4 * 5).open_weights("original") as walk:
        parts = split_stacks(walk.weights, walk.skeleton, name_as_linears)
        found = {
            part.written: torch.cat(
                [walk.read_merged_rows(part, span) for span in walk.iterate_spans(part)]
            )
            for part in parts
            if part.is_part and ".layers.1." in part.path
        }
    owner = "model.layers.1.feed_forward.experts"
    stacks = files[f"{owner}.gate_up_proj"], files[f"{owner}.down_proj"]
    assert len(found) == 3 * 4
    for expert in range(4):
        gate, up = stacks[0][expert].T.chunk(2)
        assert torch.equal(found[f"{owner}.{expert}.gate_proj.weight"], gate)
        assert torch.equal(found[f"{owner}.{expert}.up_proj.weight"], up)
        assert torch.equal(found[f"{owner}.{expert}.down_proj.weight"], stacks[1][expert].T)


def test_names_of_linears_that_the_files_call_otherwise(tmp_path: Path) -> None:
    """Granite's tensors, input_linear and output_linear, are no experts' by their names."""
    run = make_run(tmp_path / "run", None, config=stacked_mixture("granitemoe"))
    with run.job(tmp_path / "out").open_weights("original") as walk:
        parts = split_stacks(walk.weights, walk.skeleton, name_as_linears)
    owner = "model.layers.0.block_sparse_moe.experts"
    assert [p.written for p in parts if p.is_part and ".layers.0." in p.path and p.first < 256] == [
        f"{owner}.0.gate_proj.weight",
        f"{owner}.0.up_proj.weight",
        *(f"{owner}.{expert}.down_proj.weight" for expert in range(4)),
    ]
    assert {p.num_rows for p in parts if p.is_part} == {128, 64}
    assert [p.written for p in name_by_modules(parts)] == [
        p.written.replace("router.layer", "router") for p in parts
    ]


def test_parts_of_a_joined_weight_are_rows_of_one_tensor() -> None:
    """In the order of their numbers, which is not that of the files."""

    def make(number: int, name: str, rows: int) -> BaseWeight:
        path = f"model.layers.0.attn.conv1d.weight_part_{number}"
        info = TensorSpec(f"layers.0.attn.{name}_conv1d.weight", torch.float32, (rows, 1, 4))
        return BaseWeight(info, path, None, info.name)

    other = BaseWeight(TensorSpec("norm", torch.float32, (5,)), "norm", None, "norm")
    found = join_parts([make(1, "k", 2), make(0, "q", 3), other, make(2, "v", 5)])
    assert found[2] == other and {w.written for w in found} == {
        "norm",
        "layers.0.attn.conv1d.weight",
    }
    assert [w.joined for w in found] == [(3, 10), (0, 10), None, (5, 10)]
    planned = [spec for w in found for spec in w.plan_dense_tensors(torch.bfloat16)]
    assert [(spec.name, spec.shape) for spec in planned] == [
        ("layers.0.attn.conv1d.weight", (10, 1, 4)),
        ("norm", (5,)),
    ]


def test_names_of_modules_have_the_prefix_of_the_files() -> None:
    """The text model of Llama 4, whose paths begin below the towers."""
    embedding = TensorSpec("language_model.model.embed_tokens.weight", torch.float32, (3, 4))
    router = TensorSpec("language_model.model.moe.gate.weight", torch.float32, (3, 4))
    tower = TensorSpec("vision_model.conv.weight", torch.float32, (3, 4))
    weights = [
        BaseWeight(embedding, "model.embed_tokens.weight", None, embedding.name),
        BaseWeight(router, "model.mlp.router.weight", None, router.name),
        BaseWeight(tower, tower.name, None, tower.name),
    ]
    assert [w.written for w in name_by_modules(weights)] == [
        embedding.name,
        "language_model.model.mlp.router.weight",
        tower.name,
    ]
