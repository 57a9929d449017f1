"""A codec that GPTQ encodes for: row-local, as far from the inputs as GPTQ, refusals."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_peft.core.errors import UserError
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.calibrated_codec import CalibratedCodec, StoredFactor
from dist_peft.quant.gptq import compute_gram, factorize_hessian, solve_weight_rows

COLUMNS, PADDED = 44, 48


@pytest.fixture
def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator)
    return torch.randn(300, COLUMNS, generator=generator) @ mix


@pytest.fixture
def codec(inputs: Tensor, tmp_path: Path) -> CalibratedCodec:
    factor = factorize_hessian(compute_gram(inputs).double(), 16)
    StoredFactor.write_factor(factor, tmp_path / "factor.safetensors")
    return CalibratedCodec(3, 16, factor=StoredFactor(str(tmp_path / "factor.safetensors"), PADDED))


def test_rows_are_those_of_gptq_whatever_the_span(inputs: Tensor, codec: CalibratedCodec) -> None:
    weight = torch.randn(50, COLUMNS, generator=torch.Generator().manual_seed(1))
    plain = AffineCodec(3, 16)
    factor = factorize_hessian(compute_gram(inputs).double(), 16)
    packed = codec.quantize_to_packed(weight)
    assert torch.equal(packed, solve_weight_rows(weight, factor, plain))
    for start, stop in ((0, 1), (7, 30), (30, 50), (50, 50)):
        assert torch.equal(codec.quantize_to_packed(weight[start:stop]), packed[start:stop])
    assert torch.equal(
        codec.dequantize_rows(packed, COLUMNS, torch.float32),
        plain.dequantize_rows(packed, COLUMNS, torch.float32),
    )

    def output_error(rows: Tensor) -> float:
        kept = plain.dequantize_rows(rows, COLUMNS, torch.float32)
        return float(((kept - weight) @ inputs.T).square().sum())

    assert output_error(packed) < 0.7 * output_error(plain.quantize_to_packed(weight))
    assert codec != plain and codec.has_integer_zeros and codec.name == "int3"


def test_files_that_are_no_factor_of_the_weight_are_refused(
    codec: CalibratedCodec, tmp_path: Path
) -> None:
    weight, file = torch.zeros(2, COLUMNS), Path(codec.factor.file)
    wider = CalibratedCodec(3, 16, factor=StoredFactor(codec.factor.file, PADDED + 16))
    with pytest.raises(UserError, match="is not for a weight of 64 columns"):
        wider.quantize_to_packed(torch.zeros(2, 64))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="cannot read GPTQ's factor"):
        codec.quantize_to_packed(weight)
    file.unlink()
    with pytest.raises(UserError, match="cannot read GPTQ's factor"):
        codec.quantize_to_packed(weight)
