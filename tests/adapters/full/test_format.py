import json
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_peft.adapters.directory import read_adapter_directory
from dist_peft.adapters.full.format import (
    TrainedWeightsMerger,
    WeightsWriter,
    contains_trained_weights,
)
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.store.staged_model import StagedModel

TENSORS = {"a.weight": torch.arange(12.0).view(4, 3), "b.bias": torch.ones(5)}


def write(directory: Path) -> None:
    shapes = {name: value.shape for name, value in TENSORS.items()}
    writer = WeightsWriter(directory, shapes, {"kind": "partial", "base": "org/name"})
    for name, value in TENSORS.items():
        writer.write_parameter(name, value.to(torch.float64))
    writer.close()


def test_writes_float32_and_replaces_what_was_there(tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    write(directory)
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "adapter",
        "dist_peft.json",
        "model.safetensors",
    ]
    found = load_file(directory / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], value) for name, value in TENSORS.items())
    assert json.loads((directory / "dist_peft.json").read_text())["base"] == "org/name"
    assert contains_trained_weights(directory) and not contains_trained_weights(tmp_path)


def test_is_no_adapter(tmp_path: Path) -> None:
    write(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"adapter\.kind partial trained.*PEFT has no format"):
        read_adapter_directory(tmp_path / "adapter")


def test_a_full_disk_is_told_at_the_end(tmp_path: Path) -> None:
    """Until then the other ranks gather with this one."""
    with (
        mock.patch.object(StagedModel, "write_rows", side_effect=UserError("disk is full")),
        pytest.raises(UserError, match="disk is full"),
    ):
        write(tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / ".adapter.partial"
    left.mkdir()
    (left / "model-00001-of-00002.safetensors").write_bytes(b"")
    write(tmp_path / "adapter")
    assert not left.exists() and contains_trained_weights(tmp_path / "adapter")


def test_reads_rows(tmp_path: Path) -> None:
    write(tmp_path)
    names = {"m.a.weight": "a.weight", "m.b.bias": "b.bias", "m.c.weight": "c.weight"}
    with ExitStack() as stack:
        weights = TrainedWeightsMerger.open_directory(tmp_path, names, stack)
        assert weights.changes_weight("m.a.weight") and not weights.changes_weight("m.c.weight")
        rows = torch.zeros(2, 3)
        found = weights.merge_weight_rows("m.a.weight", rows, Span(1, 3), "original")
        assert torch.equal(found, TENSORS["a.weight"][1:3])
        assert weights.compute_encoded_rows("m.a.weight", rows, Span(1, 3)) is rows
        weights.merge_weight_rows("m.b.bias", torch.zeros(5), Span(0, 5), "decoded")
        assert weights.list_unused_tensors() == ["a.weight"]
        with pytest.raises(UserError, match=r"a.weight has shape \[4, 3\].*another base"):
            weights.merge_weight_rows("m.a.weight", torch.zeros(2, 4), Span(0, 2), "original")


def test_a_tensor_that_the_base_lacks_stays_unused(tmp_path: Path) -> None:
    write(tmp_path)
    with ExitStack() as stack:
        weights = TrainedWeightsMerger.open_directory(tmp_path, {"m.b.bias": "b.bias"}, stack)
        assert "a.weight" in weights.list_unused_tensors()


def test_a_trained_tensor_that_was_removed(tmp_path: Path) -> None:
    write(tmp_path / "adapter")
    save_file({"b.bias": TENSORS["b.bias"]}, tmp_path / "adapter" / "model.safetensors")
    with (
        ExitStack() as stack,
        pytest.raises(UserError, match=r"lacks a\.weight, which was"),
    ):
        TrainedWeightsMerger.open_directory(
            tmp_path / "adapter", {name: name for name in TENSORS}, stack
        )
