"""``hf-bf16``: type and base of the merge, and what lowers its error."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_peft.core.config.run import QuantConfig
from dist_peft.export.formats.hf_bf16 import HfBf16Export
from dist_peft.export.formats.registry import export_model
from tests.support.export_runs import FakeRun, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    return make_run(tmp_path_factory.mktemp("run"), QuantConfig())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_decoded_base_is_exact(dtype: str, run: FakeRun, tmp_path: Path) -> None:
    settings = {"into": "decoded", "dtype": dtype}
    result = export_model("hf-bf16", run.job(tmp_path / "out", **settings))
    assert result.exact and result.how == f"merged into the decoded base, {dtype}"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(value.dtype) for value in tensors.values()} == {f"torch.{dtype}"}
    consumer, found = run.verify("hf-bf16", result)
    assert consumer == "transformers, float32"
    assert found.relative < (1e-4 if dtype == "float32" else 0.05)
    format, job = HfBf16Export(), run.job(tmp_path / "out", **settings)
    hint = format.suggest_better(job, result, found)
    assert hint == ("" if dtype == "float32" else "--dtype float32 rounds nothing")
    assert ("Type of the weights", dtype) in format.list_report_rows(job, result, consumer)


def test_original_base_is_not(run: FakeRun, tmp_path: Path) -> None:
    result = export_model("hf-bf16", run.job(tmp_path / "out"))
    assert not result.exact and result.written.tensors == len(run.trained)
    _, found = run.verify("hf-bf16", result)
    hint = HfBf16Export().suggest_better(run.job(tmp_path / "out"), result, found)
    assert "--base decoded" in hint
    stored = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert stored.dtype == torch.bfloat16
