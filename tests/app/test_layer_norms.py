import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dist_peft.app.layer_norms import compute_product_norm, measure_layer_norms


def test_norm_of_a_product_without_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(7, 3, generator=generator)
    a = torch.randn(3, 5, generator=generator)
    expected = float(torch.linalg.matrix_norm(b.double() @ a.double()))
    assert compute_product_norm(b, a) == pytest.approx(expected, rel=1e-12)


def write_adapter(directory: Path, settings: object, tensors: dict[str, Tensor]) -> None:
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    prefixed = {f"base_model.model.{name}": value for name, value in tensors.items()}
    save_file(prefixed, directory / "adapter_model.safetensors")


@pytest.mark.parametrize("use_rslora", [False, True])
def test_of_lora(tmp_path: Path, use_rslora: bool) -> None:
    """Pairs alone, each with its scaling, blocks in the order of their numbers."""
    settings = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": use_rslora,
        "alpha_pattern": {"v": 16},
    }
    a, b = torch.ones(4, 2), torch.ones(3, 4)  # b @ a: 4 in each of 6 places
    tensors = {}
    for block in (10, 2):
        for name in ("q", "v"):
            tensors[f"m.layers.{block}.{name}.lora_A.weight"] = a.clone()
            tensors[f"m.layers.{block}.{name}.lora_B.weight"] = b * block
    tensors["m.layers.2.q.lora_magnitude_vector"] = torch.full((3,), 99.0)
    tensors["m.head.lora_A.weight"] = a.clone()
    write_adapter(tmp_path, settings, tensors)
    found = measure_layer_norms(tmp_path)
    assert found is not None and found.meaning == "norm of the weights' change"
    scale = 4.0 if use_rslora else 2.0  # of v twice that
    norms = [scale * block * ((1 + 4) * 6 * 16) ** 0.5 for block in (2, 10)]
    assert [block for block, _ in found.by_block] == ["2", "10"]
    assert [norm for _, norm in found.by_block] == pytest.approx(norms)


def test_of_experts(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    experts, r, out, columns = 3, 2, 5, 4
    a = torch.randn(experts * r, columns, generator=generator)
    b = torch.randn(out, r * experts, generator=generator)
    settings = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": 6,
        "target_parameters": ["experts.down_proj"],
    }
    own = {"m.layers.1.experts.lora_A.weight": a, "m.layers.1.experts.lora_B.weight": b}
    write_adapter(tmp_path, settings, own)
    wanted = 0.0
    for expert in range(experts):
        product = b.view(out, r, experts)[:, :, expert] @ a[expert * r : expert * r + r]
        wanted += float((3 * product).double().square().sum())
    found = measure_layer_norms(tmp_path)
    assert found is not None and found.by_block == [("1", pytest.approx(wanted**0.5))]


def test_of_other_methods(tmp_path: Path) -> None:
    tensors = {"m.h.0.lora_A.weight": torch.ones(2, 2), "m.h.0.lora_B.weight": torch.ones(2, 2)}
    for settings in ({"peft_type": "IA3"}, []):
        write_adapter(tmp_path, settings, tensors)
        found = measure_layer_norms(tmp_path)
        assert found is not None and found.by_block == [("0", pytest.approx(8**0.5))]
        assert found.meaning == "norm of the trained tensors"


def test_nothing_to_show(tmp_path: Path) -> None:
    assert measure_layer_norms(tmp_path / "absent") is None
    assert measure_layer_norms(tmp_path) is None
    write_adapter(tmp_path, {}, {"prompt": torch.ones(2)})
    assert measure_layer_norms(tmp_path) is None
    lone = {"m.layers.0.q.lora_A.weight": torch.ones(2, 2)}
    write_adapter(tmp_path, {"peft_type": "LORA", "r": 2, "lora_alpha": 2}, lone)
    assert measure_layer_norms(tmp_path) is None
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors")
    assert measure_layer_norms(tmp_path) is None
