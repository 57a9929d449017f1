"""Learning-rate factors by depth."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dist_peft.adapters.lora.method import LoraAdapter
from dist_peft.core.config.run import BaseConfig, LoraConfig
from dist_peft.engine.engine_protocol import trainable_parameters
from dist_peft.model.layer_decay import LayerDecay
from dist_peft.model.skeleton import build_skeleton
from tests.support.tiny_models import CONFIGS, save_model


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(3, 2), nn.Embedding(4, 2)
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(11))
        self.layers[3].embedding = nn.Embedding(2, 2)  # of a block (per-layer embeddings)
        self.norm, self.head = nn.LayerNorm(2), nn.Linear(2, 3)


def test_factors() -> None:
    """Those of timm: ``decay ** (layer_max - layer)``, the stem being layer 0."""
    model = Layers()
    scale = LayerDecay(model, list(model.layers), 0.75, lambda name: 1.0)
    for name in ("embed.weight", "positions.weight"):
        assert scale(name) == 0.75**12
    for number in range(11):
        assert scale(f"layers.{number}.weight") == 0.75 ** (11 - number)
    assert scale("layers.3.embedding.weight") == 0.75**8
    assert scale("norm.weight") == scale("head.bias") == 1.0


def test_times_the_factor_of_the_adapter(tmp_path: Path) -> None:
    save_model(CONFIGS["llama"], tmp_path)
    skeleton = build_skeleton(BaseConfig(path=str(tmp_path), quant=None), tmp_path)
    adapter = LoraAdapter(LoraConfig(r=2, lr_ratio=16.0), seed=0, arithmetic=torch.float32)
    adapter.attach_to_model(skeleton.model)
    scale = LayerDecay(skeleton.model, skeleton.blocks, 0.5, adapter.get_lr_scale)
    found = {name: scale(name) for name in trainable_parameters(skeleton.model)}
    assert found
    for name, factor in found.items():
        depth = 0.5 if ".layers.1." in name else 0.25
        assert factor == pytest.approx(depth * adapter.get_lr_scale(name)), name
    assert set(found.values()) == {0.25, 0.5, 4.0, 8.0}
