"""Consumers: which is asked, and what is said where there is none."""

from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_peft.core.config.run import QuantConfig
from dist_peft.export import verify_formats
from dist_peft.export.formats.registry import export_model
from dist_peft.export.time_limit import VerificationSkipped
from dist_peft.export.verify_formats import patch_bitsandbytes_layers, verify_with_consumer
from tests.support.export_runs import make_run


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Modules that are not installed."""
    absent: set[str] = set()

    def find(name: str, *rest: Any) -> Any:
        return None if name in absent else util.find_spec(name, *rest)

    monkeypatch.setattr(verify_formats, "find_spec", find)
    for other in verify_formats.OTHERS.values():
        monkeypatch.delenv(other.variable, raising=False)
    return absent


@pytest.mark.parametrize(
    ("name", "module", "words"),
    [
        ("mlx", "mlx_lm", r"pip install 'mlx\[cpu\]' mlx-lm.*DIST_PEFT_MLX_PYTHON"),
        ("gptq", "gptqmodel", "pip install gptqmodel optimum.*DIST_PEFT_GPTQ_PYTHON"),
        ("bnb-nf4", "bitsandbytes", "bitsandbytes is not installed; pip install bitsandbytes"),
        ("compressed-tensors", "compressed_tensors", "pip install compressed-tensors"),
    ],
)
def test_absent_consumer(
    name: str, module: str, words: str, without: set[str], tmp_path: Path
) -> None:
    run = make_run(tmp_path, QuantConfig())
    without.add(module)
    with pytest.raises(VerificationSkipped, match=words):
        verify_with_consumer(name, tmp_path, run.probe, torch.float32)


def test_consumer_that_refuses_is_an_error(
    without: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = make_run(tmp_path, QuantConfig())
    monkeypatch.setenv("DIST_PEFT_MLX_PYTHON", "/bin/false")
    with pytest.raises(RuntimeError, match="mlx cannot load"):
        verify_with_consumer("mlx", tmp_path, run.probe, torch.float32)


def test_gguf_is_loaded_by_transformers_without_llama_cpp(
    without: set[str], tmp_path: Path
) -> None:
    without.add("llama_cpp")
    run = make_run(tmp_path, QuantConfig())
    exported = export_model("gguf", run.job(tmp_path / "a.gguf", kind="f16", into="decoded"))
    consumer, found = verify_with_consumer("gguf", exported.path, run.probe, torch.float32)
    assert consumer.startswith("transformers") and found.relative < 0.02


@pytest.mark.parametrize(("out_features", "in_features"), [(64, 128), (64, 96), (48, 40)])
@pytest.mark.parametrize("nested", [True, False])
def test_bitsandbytes_computes_with_what_is_stored(
    out_features: int, in_features: int, nested: bool
) -> None:
    """On this CPU, whichever it is; the weights are looked up by hand."""
    bnb = pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    linear = bnb.nn.Linear4bit(
        in_features,
        out_features,
        compute_dtype=torch.float32,
        compress_statistics=nested,
        quant_type="nf4",
    )
    linear.bias.data = torch.randn(out_features, generator=generator)
    linear.weight = bnb.nn.Params4bit(weight, False, None, 64, nested, "nf4", module=linear)
    model = nn.Sequential(linear.to("cpu")).eval()
    packed, state = linear.weight.data.flatten(), linear.weight.quant_state
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    scales = state.absmax
    if nested:
        scales = bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset
    stored = state.code[codes] * scales.repeat_interleave(64)[: codes.numel()]
    decoded = bnb.functional.dequantize_4bit(linear.weight.data, state)
    own, theirs = ((w.view_as(weight) - weight).norm() / weight.norm() for w in (stored, decoded))
    print(f"{out_features} x {in_features}: error {own:.1%} as stored, {theirs:.1%} as decoded")
    patch_bitsandbytes_layers(model)
    with torch.no_grad():
        x = torch.randn(5, in_features, generator=generator)
        wanted = nn.functional.linear(x, stored.view_as(weight), linear.bias)
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    assert not patch_bitsandbytes_layers(model)
