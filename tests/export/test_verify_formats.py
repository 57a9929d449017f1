"""Consumers: which is asked, and what is said where there is none."""

from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_peft.core.config.run import QuantConfig
from dist_peft.export import verify_formats
from dist_peft.export.formats.registry import FORMATS, export_model
from dist_peft.export.time_limit import VerificationSkipped
from dist_peft.export.verify import Comparison
from dist_peft.export.verify_formats import ConsumerRequest
from tests.support.export_runs import FakeRun, make_run


@pytest.fixture(autouse=True)
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds and lines are those of transformers; llama.cpp rounds activations to 8 bits."""
    monkeypatch.delenv("DIST_PEFT_XLLAMACPP_PYTHON", raising=False)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Modules that are not installed."""
    absent: set[str] = set()

    def find(name: str, *rest: Any) -> Any:
        return None if name in absent else util.find_spec(name, *rest)

    monkeypatch.setattr(verify_formats, "find_spec", find)
    for name in ("MLX", "GPTQ", "LLAMACPP"):
        monkeypatch.delenv(f"DIST_PEFT_{name}_PYTHON", raising=False)
    return absent


def verify(name: str, out: Path, run: FakeRun) -> tuple[str, Comparison]:
    """Verify a directory that the consumer never reads."""
    request = ConsumerRequest(out, run.probe, torch.float32)
    return FORMATS[name].verify_export(run.job(out), request)


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
        verify(name, tmp_path, run)


def test_consumer_that_refuses_is_an_error(
    without: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = make_run(tmp_path, QuantConfig())
    monkeypatch.setenv("DIST_PEFT_MLX_PYTHON", "/bin/false")
    with pytest.raises(RuntimeError, match="mlx cannot load"):
        verify("mlx", tmp_path, run)


def test_gguf_is_loaded_by_transformers_without_llama_cpp(
    without: set[str], tmp_path: Path
) -> None:
    without.add("llama_cpp")
    run = make_run(tmp_path, QuantConfig())
    exported = export_model("gguf", run.job(tmp_path / "a.gguf", type="f16", into="decoded"))
    consumer, found = run.verify("gguf", exported)
    assert consumer.startswith("transformers") and found.relative < 0.02
