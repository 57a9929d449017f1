"""The script that runs in a consumer's own environment."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dist_peft.core.config.run import QuantConfig
from dist_peft.export import verify_consumer
from dist_peft.export.formats.registry import export_model
from dist_peft.export.verify import compare_logits
from tests.support.export_runs import make_run


def test_script_imports_nothing_of_the_package(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", verify_consumer.__file__, "unknown", "model", "out", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "KeyError: 'unknown'" in done.stderr
    assert "dist_peft" not in Path(verify_consumer.__file__).read_text().replace("dist_peft.", "")


@pytest.mark.llama_cpp
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_1"])
def test_llama_cpp_runs_the_file(kind: str, tmp_path: Path) -> None:
    python = os.environ.get("DIST_PEFT_LLAMACPP_PYTHON")
    if python is None:
        pytest.skip("DIST_PEFT_LLAMACPP_PYTHON names no Python with llama-cpp-python")
    import torch

    quant = QuantConfig(kind="int", bits=4, group_size=32)
    run = make_run(tmp_path, quant)
    exported = export_model("gguf", run.job(tmp_path / "a.gguf", kind=kind, into="decoded"))
    command = [python, verify_consumer.__file__, "llama.cpp", exported.path, tmp_path / "out.npy"]
    ids = [str(i) for i in run.probe.input_ids[0].tolist()]
    done = subprocess.run([*command, *ids], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("llama.cpp (llama-cpp-python")
    found = compare_logits(torch.from_numpy(np.load(tmp_path / "out.npy")), run.probe)
    assert found.relative < {"f16": 0.05, "q8_0": 0.2, "q4_1": 1.0}[kind]
