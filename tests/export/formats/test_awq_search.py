"""The search of factors against a loop over powers, columns and groups."""

import torch
from torch import Tensor

from dist_peft.export.formats.awq_search import InputSample, search_factors
from dist_peft.quant.affine import AffineCodec

CODEC = AffineCodec(4, 16)


def make_case() -> tuple[list[Tensor], InputSample]:
    """Two linears; three columns have inputs 30 times as large."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 32, generator=generator) for rows in (24, 8)]
    rows = torch.randn(40, 32, generator=generator)
    rows[:, [3, 17, 30]] *= 30
    return weights, InputSample(rows, rows.abs().mean(0))


def measure_slowly(weights: list[Tensor], inputs: InputSample, power: float) -> float:
    raised = [float(value) ** power for value in inputs.mean]
    scale = (max(raised) * min(raised)) ** 0.5
    factors = [value / scale for value in raised]
    total = 0.0
    for weight in weights:
        scaled = torch.stack([weight[:, i] * factors[i] for i in range(32)], 1)
        packed = CODEC.quantize_to_packed(scaled)
        decoded = CODEC.dequantize_rows(packed, 32, torch.float32)
        for x in inputs.rows:
            shrunk = torch.tensor([float(x[i]) / factors[i] for i in range(32)])
            total += float((decoded @ shrunk - weight @ x).square().sum())
    return total


def test_factors_are_those_of_a_loop() -> None:
    weights, inputs = make_case()
    found = search_factors(weights, inputs, CODEC)
    errors = [measure_slowly(weights, inputs, step / 20) for step in range(20)]
    best = errors.index(min(errors))
    assert best > 0  # large inputs make it worth
    raised = inputs.mean ** (best / 20)
    torch.testing.assert_close(found.factors, raised / (raised.max() * raised.min()).sqrt())
    size = sum(float((inputs.rows @ weight.T).square().sum()) for weight in weights)
    assert abs(found.error - min(errors) / size) < 1e-3 * found.error
    assert abs(found.plain_error - errors[0] / size) < 1e-3 * found.plain_error
    assert found.error < 0.5 * found.plain_error


def test_plain_rounding_where_all_inputs_are_alike() -> None:
    weights, inputs = make_case()
    alike = InputSample(inputs.rows, torch.ones(32))
    found = search_factors(weights, alike, CODEC)
    assert torch.equal(found.factors, torch.ones(32)) and found.error == found.plain_error


def test_inputs_of_zeros_have_no_infinite_factors() -> None:
    weights, inputs = make_case()
    dead = inputs.rows.clone()
    dead[:, 5] = 0
    found = search_factors(weights, InputSample(dead, dead.abs().mean(0)), CODEC)
    assert found.factors.isfinite().all() and (found.factors > 0).all()
