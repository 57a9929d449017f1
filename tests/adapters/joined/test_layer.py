"""Each part of a joined layer's rows is what its adapter's own layer computes of them."""

import copy
import math

import torch
from torch import Tensor, nn

from dist_peft.adapters.joined.layer import JoinedLayer
from dist_peft.adapters.joined.row_shares import RowShares
from dist_peft.adapters.lora.layer import LoraLinear, LoraSpec
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout
from tests.support.adapters import freeze, int_codec

IN, OUT, LENGTH = 32, 20, 3
RANKS = {0: 2, 2: 5}
"""By number; adapter 1 does not target the layer."""
SHARES = [(0, 2), (1, 1), (2, 3)]


def make_layers(p: float = 0.0) -> tuple[JoinedLayer, dict[int, LoraLinear], RowShares]:
    """A joined layer, and the layer of each adapter alone with the same values."""
    torch.manual_seed(0)
    base = freeze(nn.Linear(IN, OUT), int_codec())
    layers = {}
    for number, r in RANKS.items():
        position = DropoutPosition(number)
        count = dict(SHARES)[number]
        position.begin_micro_batch(1, torch.arange(count))
        spec = LoraSpec(r, 0.5 + number, torch.float32, number)
        layer = LoraLinear(base, "q", spec, SampleDropout(p, "q", position))
        layer.lora_A = nn.Parameter(torch.randn(r, IN))
        layer.lora_B = nn.Parameter(torch.randn(OUT, r))
        layers[number] = layer
    alone, shares = copy.deepcopy(layers), RowShares()
    return JoinedLayer(base, "q", layers, shares), alone, shares


def compute_gradients(y: Tensor, x: Tensor, layers: dict[int, LoraLinear]) -> list[Tensor]:
    own = [p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)]
    return list(torch.autograd.grad(y.square().sum(), [x, *own]))


def test_rows_and_gradients_are_those_of_each_alone() -> None:
    for p in (0.0, 0.4):
        joined, alone, shares = make_layers(p)
        shares.split_batch(SHARES, LENGTH)
        x = torch.randn(6, LENGTH, IN, requires_grad=True)
        parts = x.split([count for _, count in SHARES])
        expected = torch.cat([alone[0](parts[0]), alone[2].base(parts[1]), alone[2](parts[2])])
        found = joined(x)
        torch.testing.assert_close(found, expected)
        layers = {int(k): layer for k, layer in joined.points.items()}
        pairs = zip(
            compute_gradients(found, x, layers),  # type: ignore[arg-type]
            compute_gradients(expected, x, alone),
            strict=True,
        )
        for mine, want in pairs:
            torch.testing.assert_close(mine, want)
        assert torch.equal(joined(x.flatten(0, 1)).view(found.shape), found) or p


def test_one_adapter_for_all_rows_has_its_own_bits() -> None:
    joined, alone, shares = make_layers()
    x = torch.randn(2, LENGTH, IN)
    for number in range(3):
        with shares.give_all(number):
            found = joined(x)
        layer = alone.get(number)
        assert torch.equal(found, alone[0].base(x) if layer is None else layer(x))
    assert shares.only is None


def test_value_that_is_not_finite_stays_in_its_rows() -> None:
    joined, _, shares = make_layers()
    shares.split_batch(SHARES, LENGTH)
    layers = {int(k): layer for k, layer in joined.points.items()}
    x = torch.randn(6, LENGTH, IN)
    losses = joined(x).split([count for _, count in SHARES])
    (losses[0].sum() * math.nan + losses[2].sum()).backward()
    assert layers[0].lora_B.grad.isnan().all()  # type: ignore[union-attr]
    for parameter in (layers[2].lora_A, layers[2].lora_B):
        assert parameter.grad.isfinite().all() and parameter.grad.any()  # type: ignore[union-attr]


def test_base_is_found_once() -> None:
    joined, _, _ = make_layers()
    names = [name for name, _ in joined.named_parameters(remove_duplicate=False)]
    assert [name for name in names if name.endswith("packed")] == ["base.packed"]
    assert "points.2.lora_A" in names
    assert joined.points["2"].base is joined.base
