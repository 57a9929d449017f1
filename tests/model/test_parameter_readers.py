"""Readers of parameters outside of the blocks, of models that ``transformers`` builds."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dist_peft.core.config.run import BaseConfig
from dist_peft.model.parameter_readers import (
    ReaderWatch,
    find_readers,
    is_never_read,
    is_read_by_root,
    list_unread_buffers,
    list_unread_parameters,
    mark_readers,
    refuse_forward,
)
from dist_peft.model.skeleton import build_skeleton
from tests.support.tiny_models import CONFIGS, OUTER, save_model


def list_readers(config: object, directory: Path) -> dict[str, list[str]]:
    save_model(config, directory)  # type: ignore[arg-type]
    model = build_skeleton(BaseConfig(path=str(directory)), directory).model
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for path, module in model.named_modules():
        for name in module._parameters:
            if (readers := find_readers(module, name)) is not None:
                found[f"{path}.{name}"] = [names[reader] for reader in readers]
    return found


def test_buffers_of_towers_are_unread() -> None:
    model = nn.ModuleDict({"tower": nn.BatchNorm1d(2), "text": nn.BatchNorm1d(2)})
    model.requires_grad_(False)
    mark_readers(model, {("tower", "weight"): (), ("tower", "bias"): ()})
    assert list_unread_buffers(model) == {id(buffer) for buffer in model["tower"].buffers()}
    mark_readers(model, {("text", "weight"): ()})  # its bias is read
    assert list_unread_buffers(model) == {id(buffer) for buffer in model["tower"].buffers()}


def test_tied_embeddings_have_two_readers(tmp_path: Path) -> None:
    both = ["lm_head", "model.embed_tokens"]
    assert list_readers(CONFIGS["llama-tied-bias"], tmp_path) == {
        "model.embed_tokens.weight": both,
        "lm_head.weight": both,
        "model.norm.weight": ["model.norm"],
    }


def test_towers_are_never_read(tmp_path: Path) -> None:
    found = list_readers(OUTER["gemma3"], tmp_path)
    unread = {name for name, readers in found.items() if not readers}
    assert len(unread) == 50 and {name.split(".")[1] for name in unread} == {
        "vision_tower",
        "multi_modal_projector",
    }
    assert found["model.language_model.norm.weight"] == ["model.language_model.norm"]


class Odd(nn.Module):
    """Reads ``gate`` itself, ``scale.weight`` from outside, and ``shared`` in a block; of its own
    ``mask`` it reads nothing, for these inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.mask = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        self.scale, self.shared, self.tower = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.outer = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        shared = self.shared
        self.blocks[0].forward = lambda y: shared(y)  # type: ignore[method-assign]
        for block in self.blocks:
            x = block(self.outer(x) * self.gate) + self.scale.weight[0]
        return x


def test_readers_that_are_no_module(tmp_path: Path) -> None:
    model = Odd()
    watch = ReaderWatch(list(model.blocks))
    with watch.watch_forward(model):
        model(torch.ones(2, 3))
    unread = {("scale", "bias"), ("tower", "weight"), ("tower", "bias")}
    inner = {(f"outer.{n}", name) for n in (0, 1) for name in ("weight", "bias")}
    assert {key: readers for key, readers in watch.found.items() if readers} == dict.fromkeys(
        inner, ("outer",)
    )
    assert {key for key, readers in watch.found.items() if readers == ()} == unread
    outside = {("", "gate"), ("scale", "weight"), ("shared", "weight"), ("shared", "bias")}
    assert {key for key, readers in watch.found.items() if readers is None} == outside
    mark_readers(model, watch.found)
    assert is_read_by_root(model, "gate") and is_read_by_root(model.shared, "weight")
    assert not is_read_by_root(model, "mask") and not is_read_by_root(model.tower, "weight")
    assert find_readers(model.outer[0], "weight") == (model.outer,)
    assert find_readers(model, "gate") is None and find_readers(model, "mask") is None
    assert not is_never_read(model, "mask")  # loaded: with other inputs it may be read
    assert find_readers(model.shared, "weight") is None
    assert is_never_read(model.tower, "weight") and not is_never_read(model.shared, "weight")
    found = list_unread_parameters(model)
    assert len(found) == 3 and id(model.tower.bias) in found
    model.tower.requires_grad_(True)  # an adapter that trains it
    assert not is_never_read(model.tower, "weight")
    refuse_forward(model.tower, "tower")
    with pytest.raises(RuntimeError, match="tower was not loaded, since a forward of tokens"):
        model.tower(torch.ones(1, 3))
