"""bitsandbytes computes with the stored weights, whatever kernels this CPU has."""

import pytest
import torch
from torch import nn

from dist_peft.export.verify_bitsandbytes import patch_bitsandbytes_layers


@pytest.mark.parametrize(("out_features", "in_features"), [(64, 128), (64, 96), (48, 40)])
@pytest.mark.parametrize("nested", [True, False])
def test_bitsandbytes_computes_with_what_is_stored(
    out_features: int, in_features: int, nested: bool
) -> None:
    """On this CPU, whichever it is; the weights are looked up by hand."""
    bnb = pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    linear = bnb.nn.Linear4bit(
        in_features,
        out_features,
        compute_dtype=torch.float32,
        compress_statistics=nested,
        quant_type="nf4",
    )
    linear.bias.data = torch.randn(out_features, generator=generator)
    linear.weight = bnb.nn.Params4bit(weight, False, None, 64, nested, "nf4", module=linear)
    model = nn.Sequential(linear.to("cpu")).eval()
    packed, state = linear.weight.data.flatten(), linear.weight.quant_state
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    scales = state.absmax
    if nested:
        scales = bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset
    stored = state.code[codes] * scales.repeat_interleave(64)[: codes.numel()]
    decoded = bnb.functional.dequantize_4bit(linear.weight.data, state)
    own, theirs = ((w.view_as(weight) - weight).norm() / weight.norm() for w in (stored, decoded))
    print(f"{out_features} x {in_features}: error {own:.1%} as stored, {theirs:.1%} as decoded")
    patch_bitsandbytes_layers(model)
    with torch.no_grad():
        x = torch.randn(5, in_features, generator=generator)
        wanted = nn.functional.linear(x, stored.view_as(weight), linear.bias)
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    assert not patch_bitsandbytes_layers(model)
