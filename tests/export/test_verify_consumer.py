"""The script that runs in a consumer's own environment."""

import inspect
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_peft.core.config.run import QuantConfig
from dist_peft.export import verify_consumer
from dist_peft.export.formats.gguf_format import LLAMA_CPP
from dist_peft.export.formats.registry import FORMATS, export_model
from dist_peft.export.verify import compare_logits
from dist_peft.export.verify_formats import ConsumerRequest, ProcessConsumer
from tests.support.export_runs import make_run


@pytest.mark.e2e
def test_script_imports_nothing_of_the_package(tmp_path: Path) -> None:
    functions = [
        known.consumer.function
        for known in FORMATS.values()
        if isinstance(getattr(known, "consumer", None), ProcessConsumer)
    ]
    functions.append(LLAMA_CPP.function)
    assert len(functions) == 4
    for function in functions:
        assert "dist_peft" not in inspect.getsource(function)
    (tmp_path / "known.py").write_text("def count(model, ids, more):\n    return more, [ids]\n")
    command = [sys.executable, "-I", verify_consumer.__file__, "known.py"]
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, check=False)
    done = run([*command, "unknown", "model", "out", "[1]"])
    assert done.returncode == 1 and "KeyError: 'unknown'" in done.stderr
    done = run([*command, "count", "model", "out.npy", "[4, 5]", "library 1.0"])
    assert done.returncode == 0 and done.stdout == "library 1.0\n", done.stderr
    logits = np.load(tmp_path / "out.npy")
    assert logits.dtype == np.float32 and logits.tolist() == [[[4, 5]]]
    assert "dist_peft" not in Path(verify_consumer.__file__).read_text().replace("dist_peft.", "")


@pytest.mark.e2e
@pytest.mark.llama_cpp
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_1"])
def test_llama_cpp_runs_the_file(kind: str, tmp_path: Path) -> None:
    if os.environ.get("DIST_PEFT_LLAMACPP_PYTHON") is None:
        pytest.skip("DIST_PEFT_LLAMACPP_PYTHON names no Python with llama-cpp-python")
    quant = QuantConfig(kind="int", bits=4, group_size=32)
    run = make_run(tmp_path, quant)
    exported = export_model("gguf", run.job(tmp_path / "a.gguf", type=kind, into="decoded"))
    request = ConsumerRequest(exported.path, run.probe, torch.float32)
    name, logits = LLAMA_CPP.compute_logits(request)
    assert name.startswith("llama.cpp (llama-cpp-python")
    found = compare_logits(logits, run.probe)
    assert found.relative < {"f16": 0.05, "q8_0": 0.2, "q4_1": 1.0}[kind]
