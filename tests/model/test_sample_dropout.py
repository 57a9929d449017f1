import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout


def dropout(p: float, path: str = "a.b", seed: int = 0) -> SampleDropout:
    return SampleDropout(p, path, DropoutPosition(seed))


def masks(layer: SampleDropout, step: int, samples: list[int], length: int = 50) -> torch.Tensor:
    layer.position.begin_micro_batch(step, torch.tensor(samples))
    return layer(torch.ones(len(samples), length, 8))


def test_identity_in_evaluation_and_without_probability() -> None:
    x = torch.ones(2, 3)
    assert dropout(0.0)(x) is x
    layer = dropout(0.5)
    layer.eval()
    assert layer(x) is x


def test_keeps_the_mean_and_the_scale() -> None:
    y = masks(dropout(0.25), 0, [0, 1], length=5000)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert y.mean().item() == pytest.approx(1.0, abs=0.01)


def test_mask_follows_the_sample_not_the_batch() -> None:
    together = masks(dropout(0.5), 4, [10, 11, 12, 13])
    for row, sample in enumerate([10, 11, 12, 13]):
        assert torch.equal(masks(dropout(0.5), 4, [sample])[0], together[row])
    swapped = masks(dropout(0.5), 4, [13, 10])
    assert torch.equal(swapped, together[[3, 0]])


def test_mask_depends_on_seed_path_step_and_sample() -> None:
    variants = [
        masks(dropout(0.5), 0, [0]),
        masks(dropout(0.5, path="a.c"), 0, [0]),
        masks(dropout(0.5, seed=1), 0, [0]),
        masks(dropout(0.5), 1, [0]),
        masks(dropout(0.5), 0, [1]),
        masks(dropout(0.5), 0, [-1]),
    ]
    for i, a in enumerate(variants):
        for b in variants[i + 1 :]:
            assert not torch.equal(a, b)


def test_a_longer_row_begins_with_the_same_mask() -> None:
    long = masks(dropout(0.5), 0, [5, 6], length=50)
    assert torch.equal(masks(dropout(0.5), 0, [5, 6], length=20), long[:, :20])


def draw(p: float, path: str = "a.b", seed: int = 0, step: int = 0, sample: int = 0) -> Tensor:
    """Dropped elements [512, 512] of a sample as numbers of mean 0 and variance 1."""
    layer = dropout(p, path, seed)
    layer.position.begin_micro_batch(step, torch.tensor([sample]))
    dropped = layer(torch.ones(1, 512, 512))[0] == 0
    return (dropped.double() - p) / math.sqrt(p * (1 - p))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_masks_are_like_independent_draws(p: float) -> None:
    """Sums of independent draws have variance 1; bounds are five standard deviations or more."""
    z, size = draw(p), 512
    assert abs(z.sum() / size) < 5
    assert abs(z.sum(0).square().mean() / size - 1) < 0.4  # columns; then rows
    assert abs(z.sum(1).square().mean() / size - 1) < 0.4
    # a structure of low rank would show as a singular value above 2, the edge of random matrices
    assert torch.linalg.svdvals(z)[0] / math.sqrt(size) < 2.15
    # a period or a lattice would show as a peak of the spectrum; its logarithm grows with the size
    assert torch.fft.fft2(z).abs().square().max() / size**2 < 2.2 * math.log(size**2)
    for down, right in ((1, 1), (1, 7), (13, 1), (64, 256)):  # corners of rectangles
        top, bottom = z[:-down], z[down:]
        corners = top[:, :-right] * top[:, right:] * bottom[:, :-right] * bottom[:, right:]
        assert abs(corners.sum()) < 5 * math.sqrt(corners.numel())
    others = [draw(p, path="a.c"), draw(p, seed=1), draw(p, step=1), draw(p, sample=1)]
    for other in others:
        assert abs((z * other).sum()) < 5 * size
        for pairs in (z @ other.T, z.T @ other):  # any row with any, any column with any
            assert abs((pairs / math.sqrt(size)).square().mean() - 1) < 0.05


def test_the_global_stream_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    masks(dropout(0.5), 0, [0])
    assert torch.equal(torch.rand(3), expected)


def test_flattened_batches_are_cut_into_samples() -> None:
    layer = dropout(0.5)
    kept = masks(layer, 0, [3, 4])
    assert torch.equal(layer(torch.ones(100, 8)), kept.view(100, 8))


def test_half_precision_gets_the_same_mask() -> None:
    layer = dropout(0.5)
    kept = masks(layer, 0, [3, 4])
    half = layer(torch.ones(2, 50, 8, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.float(), kept)


def test_recomputation_gives_the_same_gradient() -> None:
    layer = dropout(0.5)
    layer.position.begin_micro_batch(0, torch.tensor([1, 2]))
    grads = []
    for use in (False, True):
        x = torch.ones(2, 5, 8, requires_grad=True)
        y = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False) if use else layer(x)
        (y * y).sum().backward()
        grads.append(x.grad)
        torch.rand(7)
    assert torch.equal(grads[0], grads[1])
    assert (grads[0] == 0).any()


def test_without_begin() -> None:
    with pytest.raises(RuntimeError, match=r"dropout of a\.b: 2 rows but 0 sample ids"):
        dropout(0.5)(torch.ones(2, 3))


def test_ids_that_do_not_fit() -> None:
    layer = dropout(0.5)
    layer.position.begin_micro_batch(0, torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="3 rows but 2 sample ids"):
        layer(torch.ones(3, 3))
