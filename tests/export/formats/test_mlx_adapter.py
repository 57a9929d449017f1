"""The directory against mlx-lm's formula, and loaded by mlx-lm where it is installed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dist_peft.core.config.run import QuantConfig
from dist_peft.export.formats.mlx_adapter import convert_to_mlx
from dist_peft.export.formats.plain_lora import LinearFactors
from dist_peft.export.formats.registry import export_model
from dist_peft.export.time_limit import VerificationSkipped
from dist_peft.export.verify_formats import ConsumerRequest, ProcessConsumer
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
@pytest.mark.parametrize("quant", [None, QuantConfig()], ids=["float", "nf4"])
def test_loaded_by_mlx_lm(tmp_path: Path, quant: QuantConfig | None) -> None:
    run = make_run(tmp_path / "run", quant)
    result = export_model("mlx-adapter", run.job(tmp_path / "out"))
    config = json.loads((result.path / "adapter_config.json").read_text())
    assert config["num_layers"] == -1 and config["fine_tune_type"] == "lora"
    assert len(load_file(result.path / "adapters.safetensors")) == 28
    try:
        name, found = run.verify("mlx-adapter", result)
    except VerificationSkipped as error:
        pytest.skip(str(error))
    assert found.relative < 1e-4
    assert name.endswith("base dequantized") == (quant is not None)


def test_quantized_base_is_dequantized_for_mlx_lm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``transformers`` reads the directory that mlx-lm is given: it has the numbers of training."""
    run = make_run(tmp_path / "run", QuantConfig())
    result = export_model("mlx-adapter", run.job(tmp_path / "out"))
    probe, seen = run.probe, {}

    def compute(consumer: ProcessConsumer, request: ConsumerRequest) -> tuple[str, torch.Tensor]:
        (base,) = consumer.options
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        weights = dict(model.named_parameters())
        tensors = load_file(request.path / "adapters.safetensors")
        scale = json.loads((request.path / "adapter_config.json").read_text())
        for key in [k for k in tensors if k.endswith(".lora_a")]:
            path = key.removesuffix(".lora_a")
            change = (tensors[key] @ tensors[f"{path}.lora_b"]).T
            weights[f"{path}.weight"].data += scale["lora_parameters"]["scale"] * change
        seen["base"] = Path(base)
        with torch.no_grad():
            return "mlx-lm", model(input_ids=probe.input_ids).logits

    monkeypatch.setattr(ProcessConsumer, "find_python", lambda _: "python")
    monkeypatch.setattr(ProcessConsumer, "compute_logits", compute)
    name, found = run.verify("mlx-adapter", result)
    assert name == "mlx-lm, base dequantized" and not seen["base"].exists()
    assert found.relative < 1e-4
