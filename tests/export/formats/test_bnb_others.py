"""FP4 and LLM.int8: loaded by bitsandbytes, and quantized as it quantizes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.export.formats.registry import FORMATS, export_model
from tests.support.export_runs import (
    fork_consumers,
    make_run,
    mark_as_trained_through,
    mixture,
    read_trained_rows,
)

bnb = pytest.importorskip("bitsandbytes")
KINDS = {"bnb-fp4": "fp4", "bnb-int8": "llm_int8"}


@pytest.mark.e2e
@pytest.mark.parametrize("name", KINDS)
def test_merged_rows_are_those_that_bitsandbytes_quantizes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``in_features`` 64 does not divide stay dense in FP4. Both load."""
    fork_consumers(monkeypatch)
    run = make_run(tmp_path, None, intermediate_size=96)
    exported = export_model(name, run.job(tmp_path / "out"))
    dense = 2 if name == "bnb-fp4" else 0
    assert exported.written.packed == 14 - dense and len(exported.written.unpacked) == dense
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    weight = "model.layers.1.mlp.up_proj.weight"
    if name == "bnb-fp4":
        codes, state = bnb.functional.quantize_4bit(
            run.trained[weight], blocksize=64, quant_type="fp4"
        )
        assert torch.equal(tensors[f"{weight}.absmax"], state.absmax)
        assert (tensors[weight] != codes).float().mean() < 0.01  # ties
    else:
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(run.trained[weight].half())
        assert (tensors[weight] != codes).float().mean() < 0.01  # it rounds from 16 bits
        stored = tensors[f"{weight.removesuffix('weight')}SCB"]
        torch.testing.assert_close(stored, scales, rtol=1e-3, atol=0)
    assert run.verify(name, exported)[1].relative < (0.9 if name == "bnb-fp4" else 0.2)


@pytest.mark.parametrize("name", KINDS)
def test_trained_codes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bitsandbytes dequantizes are the weights of training, bit for bit."""
    run = make_run(tmp_path, QuantConfig(kind=KINDS[name]))  # type: ignore[arg-type]
    mark_as_trained_through(run)
    exported = export_model(name, run.job(tmp_path / "out", trained_codes=True))
    assert exported.exact
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    compared = 0
    for weight, wanted in read_trained_rows(run).items():
        own = {n: t for n, t in tensors.items() if n.startswith(f"{weight}.")}
        if name == "bnb-int8":
            scales = tensors[f"{weight.removesuffix('weight')}SCB"]
            found = bnb.functional.int8_vectorwise_dequant(tensors[weight], scales)
        elif own:
            state = bnb.functional.QuantState.from_dict(own, torch.device("cpu"))
            found = bnb.functional.dequantize_4bit(tensors[weight], state)
        else:
            found = tensors[weight]
        assert torch.equal(found.float(), wanted), weight
        compared += 1
    assert compared == 14
    run.base = run.base.model_copy(update={"quant": QuantConfig(kind="int")})
    with pytest.raises(UserError, match=rf"keeps codes of base\.quant\.kind {KINDS[name]}"):
        export_model(name, run.job(tmp_path / "int", trained_codes=True))


def test_experts_stay_dense(tmp_path: Path) -> None:
    run = make_run(tmp_path, None, config=mixture("qwen3_moe"))
    exported = export_model("bnb-int8", run.job(tmp_path / "out"))
    assert exported.written.packed == 2 * 4
    how = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert how["load_in_8bit"] is True
    assert FORMATS["bnb-int8"].list_report_rows(run.job(tmp_path), exported, "x")
