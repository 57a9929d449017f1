"""Which of gptqmodel's loaders reads an export; gptqmodel is run where its Python is named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dist_peft.export.formats import gptq_consumer
from dist_peft.export.formats.registry import export_model
from dist_peft.export.time_limit import VerificationSkipped
from dist_peft.export.verify import Probe
from dist_peft.export.verify_formats import ConsumerRequest, ProcessConsumer
from tests.support.export_runs import make_run, mixture, stacked_mixture


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("model.layers.0.mlp.experts.0.up_proj.qweight", "run_gptqmodel"),
        ("model.layers.0.mlp.up_proj.qweight", "run_plain_transformers"),
    ],
)
def test_experts_are_read_by_gptqmodels_own_loader(
    name: str, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({name: torch.zeros(2, 2, dtype=torch.int32)}, tmp_path / "model.safetensors")
    probe = Probe(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, 5), torch.zeros(1, 3, 5))
    asked: list[str] = []

    def compute(consumer: ProcessConsumer, request: ConsumerRequest) -> tuple[str, torch.Tensor]:
        asked.append(consumer.function.__name__)
        return "library", request.probe.trained

    monkeypatch.setattr(ProcessConsumer, "compute_logits", compute)
    monkeypatch.setenv("DIST_PEFT_GPTQ_PYTHON", "/bin/false")
    request = ConsumerRequest(tmp_path, probe, torch.float32)
    consumer, found = gptq_consumer.verify_with_gptqmodel(request)
    assert (consumer, found.relative, asked) == ("library", 0.0, [function])


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("name", "family", "packed", "limit"),
    [
        ("gptq", "mixtral", 32, 0.1),
        ("awq", "mixtral", 32, 0.9),
        ("gptq", "llama4_text", 38, 1),  # without the experts: 3.7
        ("gptq", "granitemoe", 8, 1),  # 3.9
        ("gptq", "gpt_oss", 8, 6),  # 13.5
    ],
)
def test_gptqmodel_computes_with_experts(
    name: str, family: str, packed: int, limit: float, tmp_path: Path
) -> None:
    """Stacks are written as the linears that gptqmodel makes of them, others stay dense."""
    config = mixture(family) if family == "mixtral" else stacked_mixture(family)
    run = make_run(tmp_path, None, config=config)
    settings = {"merge": True, "lossy": True, "bits": 8} if name == "gptq" else {}
    exported = export_model(name, run.job(tmp_path / "out", **settings, group_size=32))
    assert exported.written.packed == packed
    try:
        assert run.verify(name, exported)[1].relative < limit
    except VerificationSkipped as error:
        pytest.skip(str(error))
