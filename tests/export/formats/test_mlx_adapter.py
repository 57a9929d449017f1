"""The directory against mlx-lm's formula, and loaded by mlx-lm where it is installed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_peft.core.config.run import QuantConfig
from dist_peft.export.formats.mlx_adapter import convert_to_mlx
from dist_peft.export.formats.plain_lora import LinearFactors
from dist_peft.export.formats.registry import export_model
from dist_peft.export.time_limit import VerificationSkipped
from tests.support.export_runs import make_run


def compute_mlx_change(
    tensors: dict[str, torch.Tensor], scale: float, path: str, x: torch.Tensor
) -> torch.Tensor:
    """``LoRALinear.__call__`` of mlx-lm, without the linear."""
    return scale * ((x @ tensors[f"{path}.lora_a"]) @ tensors[f"{path}.lora_b"])


@pytest.mark.parametrize(("scalings", "scale"), [((2.0, 2.0), 2.0), ((2.0, 0.5), 1.0)])
def test_change_of_several_ranks(scalings: tuple[float, float], scale: float) -> None:
    x = torch.randn(3, 6)
    factors = {
        f"model.layers.{i}.self_attn.{name}_proj": LinearFactors(
            torch.randn(r, 6), torch.randn(5, r), s
        )
        for i, (name, r, s) in enumerate(zip("qv", (2, 4), scalings, strict=True))
    }
    tensors, settings = convert_to_mlx(factors)
    parameters = settings["lora_parameters"]
    assert parameters == {
        "rank": 4,
        "scale": scale,
        "dropout": 0.0,
        "keys": ["self_attn.q_proj", "self_attn.v_proj"],
    }
    for path, one in factors.items():
        assert tensors[f"{path}.lora_a"].shape == (6, 4)
        got = compute_mlx_change(tensors, scale, path, x)
        torch.testing.assert_close(got, x @ (one.scaling * one.B @ one.A).T, rtol=1e-5, atol=1e-5)


@pytest.mark.e2e
def test_loaded_by_mlx_lm(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", None)
    result = export_model("mlx-adapter", run.job(tmp_path / "out"))
    config = json.loads((result.path / "adapter_config.json").read_text())
    assert config["num_layers"] == -1 and config["fine_tune_type"] == "lora"
    assert len(load_file(result.path / "adapters.safetensors")) == 28
    try:
        found = run.verify("mlx-adapter", result)[1]
    except VerificationSkipped as error:
        pytest.skip(str(error))
    assert found.relative < 1e-4


def test_quantized_base_is_not_that_of_mlx_lm(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", QuantConfig())
    result = export_model("mlx-adapter", run.job(tmp_path / "out"))
    with pytest.raises(VerificationSkipped, match="quantized in a way that mlx-lm does not load"):
        run.verify("mlx-adapter", result)
