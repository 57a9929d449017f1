"""An adapter applied by PEFT to the base that training had."""

from pathlib import Path

import pytest
import torch

from dist_peft.adapters.directory import read_adapter_directory, write_adapter_directory
from dist_peft.core.config.run import QuantConfig
from dist_peft.export import verify_adapter as module
from dist_peft.export.time_limit import VerificationSkipped
from dist_peft.export.verify_adapter import verify_adapter
from tests.support.export_runs import make_run


@pytest.mark.parametrize("quant", [None, QuantConfig(), QuantConfig(kind="int", bits=3)], ids=str)
def test_adapter_on_the_base_as_trained(quant: QuantConfig | None, tmp_path: Path) -> None:
    run = make_run(tmp_path, quant)
    name, found = verify_adapter(
        run.base, run.directory, run.adapter_dir, run.adapter_dir, run.probe
    )
    assert name.startswith("peft ") and found.relative < 1e-4
    public = read_adapter_directory(run.adapter_dir)
    for key, value in public.tensors.items():
        if key.endswith("lora_B.weight"):
            public.tensors[key] = -value
    write_adapter_directory(tmp_path / "other", public, {})
    other = verify_adapter(run.base, run.directory, run.adapter_dir, tmp_path / "other", run.probe)[
        1
    ]
    assert other.relative > 1
    zeros = {n: torch.zeros_like(t) for n, t in public.tensors.items()}
    write_adapter_directory(tmp_path / "none", type(public)(public.config, zeros), {})
    lost = verify_adapter(run.base, run.directory, run.adapter_dir, tmp_path / "none", run.probe)[1]
    assert lost.relative == pytest.approx(1, rel=1e-3)


def test_without_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, None)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(VerificationSkipped, match="pip install peft"):
        verify_adapter(run.base, run.directory, run.adapter_dir, run.adapter_dir, run.probe)
