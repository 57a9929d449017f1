"""Logits of an exported directory whose weights are read block by block."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_peft.core.config.run import BaseConfig
from dist_peft.export import verify_blocks
from dist_peft.export.merge_weights import merge_model
from dist_peft.export.time_limit import VerificationSkipped
from dist_peft.export.verdict import VerificationError
from dist_peft.export.verify import Probe, verify_directory
from dist_peft.export.verify_blocks import verify_by_blocks
from tests.support.export_runs import FakeRun, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    return make_run(tmp_path_factory.mktemp("run"), None)


@pytest.fixture(scope="module")
def merged(run: FakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "out"
    merge_model(run.base, run.directory, run.adapter_dir, out)
    return out


def base(directory: Path, **settings: Any) -> BaseConfig:
    return BaseConfig(path=str(directory), quant=None, compute_dtype="float32", **settings)


def test_figures_are_those_of_the_consumer(run: FakeRun, merged: Path) -> None:
    found = verify_by_blocks(base(merged), merged, run.probe)
    wanted = verify_directory(merged, run.probe, torch.float32)
    assert found.relative == pytest.approx(wanted.relative, rel=1e-2)
    assert 0 < found.relative < 0.05 and found.top1 == wanted.top1


def test_damaged_weights_are_found(run: FakeRun, merged: Path, tmp_path: Path) -> None:
    file = "model.safetensors"
    for name in ("config.json", file):
        (tmp_path / name).write_bytes((merged / name).read_bytes())
    for change in (-1.0, math.nan):
        tensors = load_file(merged / file)
        tensors["model.layers.1.mlp.down_proj.weight"] *= change
        save_file(tensors, tmp_path / file, {"format": "pt"})
        found = verify_by_blocks(base(tmp_path), tmp_path, run.probe)
        assert math.isnan(found.relative) if math.isnan(change) else found.relative > 0.2
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / file, {"format": "pt"})
    with pytest.raises(VerificationError, match=r"cannot be read: .*model.norm.weight"):
        verify_by_blocks(base(tmp_path), tmp_path, run.probe)


def test_sequences_beyond_the_tokens_are_left_out(
    run: FakeRun, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = run.probe
    wrong = Probe(*(torch.cat([t, torch.zeros_like(t)]) for t in vars(probe).values()))
    monkeypatch.setattr(verify_blocks, "MAX_PROBE_TOKENS", probe.input_ids.shape[1] + 1)
    assert verify_by_blocks(base(merged), merged, wrong).relative < 0.05


def test_code_that_does_not_run_so_is_not_verified(
    run: FakeRun, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_nothing(*args: Any) -> Any:
        return torch.no_grad()

    monkeypatch.setattr(verify_blocks, "stream_weights", read_nothing)
    with pytest.raises(VerificationSkipped, match="pass --verify consumer"):
        verify_by_blocks(base(merged), merged, run.probe)
