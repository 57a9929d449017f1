"""Comparison of ``gguf-lora`` files: by the gguf reader, and by llama.cpp where it is installed."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from dist_peft.core.config.run import QuantConfig
from dist_peft.export.formats import gguf_lora_check
from dist_peft.export.formats.export_spec import ExportResult
from dist_peft.export.formats.gguf_lora_check import (
    LLAMA_CPP_SERVER,
    read_lora_changes,
    select_positions,
    write_base_file,
)
from dist_peft.export.formats.gguf_model import GgufModelLayout
from dist_peft.export.formats.registry import export_model
from dist_peft.export.verdict import VerificationError, judge_comparison
from dist_peft.export.verify import Probe, compare_logits
from dist_peft.export.verify_adapter import load_trained_base
from dist_peft.model.skeleton import build_skeleton
from tests.support.export_runs import FakeRun, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    return make_run(tmp_path_factory.mktemp("run"), QuantConfig())


@pytest.fixture(scope="module")
def exported(run: FakeRun, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    return export_model("gguf-lora", run.job(tmp_path_factory.mktemp("lora") / "out"))


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """No llama.cpp."""
    monkeypatch.setattr(type(LLAMA_CPP_SERVER), "find_python", lambda self: None)


@pytest.mark.usefixtures("without")
def test_read_by_the_gguf_package(run: FakeRun, exported: ExportResult) -> None:
    consumer, found = run.verify("gguf-lora", exported)
    assert consumer.startswith("gguf 0") and "llama.cpp" not in consumer
    assert found.changed and found.relative < 1e-4


def rewrite_file(source: Path, target: Path, *, alpha: float, renamed: str = "") -> None:
    """Copy a file with another alpha, and the query's factors under another name."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for tensor in reader.tensors:
        name = tensor.name.replace("attn_q", renamed or "attn_q")
        writer.add_tensor(name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.usefixtures("without")
def test_a_wrong_file_is_found(run: FakeRun, exported: ExportResult, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    wrong = ExportResult(exported.written, file, exported.how, exact=True)
    rewrite_file(exported.path, file, alpha=16.0)  # twice the change
    _, found = run.verify("gguf-lora", wrong)
    assert found.relative > 0.5
    with pytest.raises(VerificationError):
        judge_comparison(found, file, exact=True)
    rewrite_file(exported.path, file, alpha=8.0, renamed="attn_none")
    with pytest.raises(VerificationError, match=r"blk\.0\.attn_none\.weight"):
        run.verify("gguf-lora", wrong)
    file.write_bytes(b"GGUF")
    with pytest.raises(VerificationError, match="cannot read"):
        read_lora_changes(file)


def test_positions_are_spread_and_normalized() -> None:
    logits = torch.randn(1, 100, 7)
    probe, chosen = select_positions(Probe(torch.arange(100)[None], logits, logits + 3.0))
    assert len(chosen) == 32 and chosen[0] == 0 and chosen[-1] == 99
    assert probe.input_ids[0].tolist() == chosen
    torch.testing.assert_close(probe.trained, logits[:, chosen].log_softmax(-1))
    torch.testing.assert_close(probe.trained, probe.before)  # a constant is no change
    short = Probe(torch.arange(3)[None], logits[:, :3], logits[:, :3])
    assert select_positions(short)[1] == [0, 1, 2]


def test_base_file_has_every_tensor_in_llama_cpps_order(run: FakeRun, tmp_path: Path) -> None:
    model = load_trained_base(run.base, run.directory, ())
    layout = GgufModelLayout(build_skeleton(run.base, run.directory))
    names = write_base_file(model, layout, run.directory, tmp_path / "base.gguf")
    read = {t.name: np.array(t.data) for t in gguf.GGUFReader(tmp_path / "base.gguf").tensors}
    assert set(read) == set(names) and len(names) == len(dict(model.named_parameters()))
    for path, weight in model.named_parameters():
        stored = torch.from_numpy(read[layout.map_path(path)])
        assert torch.equal(layout.restore_path_rows(path, stored), weight.detach())
    query = read["blk.0.attn_q.weight"]
    assert not np.array_equal(
        query,
        dict(model.named_parameters())["model.layers.0.self_attn.q_proj.weight"].detach().numpy(),
    )


@pytest.mark.e2e
@pytest.mark.llama_cpp
def test_llama_cpp_applies_the_adapter(run: FakeRun, exported: ExportResult) -> None:
    if LLAMA_CPP_SERVER.find_python() is None:
        pytest.skip("xllamacpp is not installed, here or in DIST_PEFT_XLLAMACPP_PYTHON")
    consumer, found = run.verify("gguf-lora", exported)
    assert consumer.startswith("llama.cpp (xllamacpp")
    assert found.changed and found.relative < 0.01, found


@pytest.mark.usefixtures("without")
def test_the_reader_says_that_llama_cpp_is_not_here(
    run: FakeRun, exported: ExportResult, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", gguf_lora_check.log.name):
        _, found = run.verify("gguf-lora", exported)
    assert "DIST_PEFT_XLLAMACPP_PYTHON" in caplog.text
    assert compare_logits(run.probe.before, run.probe).relative == pytest.approx(1)
    assert found.kl < found.kl_before
