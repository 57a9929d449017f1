"""NF4 against bitsandbytes itself."""

from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file

from dist_peft.core.config.run import QuantConfig
from dist_peft.export.formats.bnb_packer import build_dynamic_map, quantize_absmax
from dist_peft.export.formats.registry import export_model
from tests.support.export_runs import make_run


def test_dynamic_map_is_bitsandbytes_own() -> None:
    assert torch.equal(build_dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("blocks", [2, 255, 256, 700])
def test_double_quantization_equals_bitsandbytes(blocks: int) -> None:
    absmax = torch.rand(blocks, generator=torch.Generator().manual_seed(blocks)) + 0.01
    codes, largest, offset = quantize_absmax(absmax)
    wanted, state = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    assert torch.equal(largest, state.absmax) and offset == absmax.mean().item()
    assert (codes != wanted).double().mean() < 0.01  # values on a border between two entries
    found = bnb.dequantize_blockwise(codes, state) + offset
    torch.testing.assert_close(found, absmax, rtol=0, atol=0.02 * float(largest.max()))


@pytest.mark.parametrize("double_quant", [True, False])
def test_tensors_are_those_of_bitsandbytes(double_quant: bool, tmp_path: Path) -> None:
    """With 104 columns blocks run across rows, and across chunks but for their row multiple."""
    run = make_run(tmp_path, QuantConfig(double_quant=double_quant), intermediate_size=104)
    job = run.job(tmp_path / "out", into="decoded", chunk_bytes=4096)
    export_model("bnb-nf4", job)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in run.trained.items():
        if f"{name}.absmax" not in tensors:
            assert torch.equal(tensors[name], weight)
            continue
        payload, state = bnb.quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant
        )
        own = {
            k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")
        }
        assert own.keys() == state.as_dict(packed=True).keys()
        assert (tensors[name] != payload).double().mean() < 1e-3  # sums rounded in another order
        read = bnb.QuantState.from_dict(dict(own), torch.device("cpu"))
        assert read.shape == weight.shape and read.dtype == torch.float32
        found = bnb.dequantize_4bit(tensors[name], read)
        wanted = bnb.dequantize_4bit(payload, state)
        assert (found - wanted).abs().mean() < 0.01 * wanted.abs().mean()
