"""The written directory: fewer blocks, layer settings, and what cannot lose a block."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dist_peft.compress import pruned_base
from dist_peft.compress.pruned_base import check_blocks_removable, write_fewer_blocks
from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.model.skeleton import build_skeleton
from tests.support.tiny_models import CONFIGS, save_model


def write_kept(directory: Path, family: str, layers: int, kept: list[int]) -> dict[str, Any]:
    """Write a model of ``family`` with the blocks ``kept`` and return its ``config.json``."""
    described = CONFIGS[family].to_dict() | {"num_hidden_layers": layers}
    if "layer_types" in described:
        described["layer_types"] = ["sliding_attention", "full_attention"] * layers
        described["layer_types"] = described["layer_types"][:layers]
    save_model(type(CONFIGS[family])(**described), directory / "base")
    base = BaseConfig(path=str(directory / "base"), quant=None, compute_dtype="float32")
    skeleton = build_skeleton(base, directory / "base")
    check_blocks_removable(skeleton)
    write_fewer_blocks(base, skeleton, kept, {"method": "blocks"}, directory / "out", World())
    found: dict[str, Any] = json.loads((directory / "out" / "config.json").read_text())
    return found


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_model_with_fewer_blocks_computes_as_the_base_without_them(
    family: str, tmp_path: Path
) -> None:
    kept = [0, 3, 4]
    config = write_kept(tmp_path, family, 5, kept)
    assert config["num_hidden_layers"] == 3 and config["pruning"] == {"method": "blocks"}
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    trunk = whole.base_model
    trunk.layers = torch.nn.ModuleList(trunk.layers[number] for number in kept)
    trunk.config.num_hidden_layers = len(kept)
    for number, layer in enumerate(trunk.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    if "layer_types" in config:
        assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
        trunk.config.layer_types = config["layer_types"]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(3, 23)[None]
    torch.testing.assert_close(found(ids).logits, whole(ids).logits)
    assert len(load_file(tmp_path / "out" / "model.safetensors")) < len(
        load_file(tmp_path / "base" / "model.safetensors")
    )


def test_blocks_that_depend_on_their_number_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if ``layer_types`` were not cut: block 1 would attend to a window, and did not before."""
    monkeypatch.setattr(
        pruned_base,
        "_cut_layer_settings",
        lambda skeleton, kept: {
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "sliding_attention"],
        },
    )
    with pytest.raises(UserError, match=r"block 1 of .* computes in another way as block 0"):
        write_kept(tmp_path, "gemma2", 3, [1, 2])
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_configuration_without_a_number_of_blocks_is_refused(tmp_path: Path) -> None:
    save_model(CONFIGS["llama"], tmp_path / "base")
    base = BaseConfig(path=str(tmp_path / "base"), quant=None)
    skeleton = build_skeleton(base, tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text())
    del config["num_hidden_layers"]
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not say num_hidden_layers: 2"):
        check_blocks_removable(skeleton)
