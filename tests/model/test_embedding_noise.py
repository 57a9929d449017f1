"""NEFTune: the size of the noise, and what it does and does not depend on."""

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from dist_peft.app.step_setup import make_training_step
from dist_peft.core.world import World
from dist_peft.data.classification import LabelledBatch
from dist_peft.data.loader import Batch
from dist_peft.model.embedding_noise import EmbeddingNoise
from tests.support.equality import build
from tests.support.tiny_runs import tiny_tree

WIDTH = 24


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, WIDTH)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


def packed(rows: list[list[int]], width: int) -> Batch:
    """Documents of the given lengths in each row; their tokens count up from the length."""
    ids, positions = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    for row, lengths in enumerate(rows):
        start = 0
        for length in [*lengths, width - sum(lengths)]:
            positions[row, start : start + length] = torch.arange(length)
            if start < sum(lengths):
                ids[row, start : start + length] = torch.arange(length) + length
            start += length
    return Batch(ids, ids, positions, torch.arange(len(rows)))


def compute_noise(batch: Batch, step: int = 0, alpha: float = 5.0, seed: int = 0) -> Tensor:
    model = Words()
    noise = EmbeddingNoise(model, alpha, seed)
    plain = model.embedding(batch.input_ids)
    noise.begin_micro_batch(step, batch.input_ids, batch.measure_documents())
    found = model.embedding(batch.input_ids)
    assert found.equal(model.embedding(batch.input_ids))  # computed twice
    noise.end_micro_batch()
    assert model.embedding(batch.input_ids).equal(plain)
    noise.begin_micro_batch(step, batch.input_ids, batch.measure_documents())
    noise.close()
    assert model.embedding(batch.input_ids).equal(plain)
    return (found - plain).detach()


def test_uniform_up_to_alpha_over_the_root_of_tokens_and_width() -> None:
    noise = compute_noise(packed([[60, 15]], 75), alpha=5)
    for span, length in ((slice(0, 60), 60), (slice(60, 75), 15)):
        part = noise[0, span] / (5 / math.sqrt(length * WIDTH))
        assert 0.97 < part.abs().max() <= 1.000001
        assert part.mean().abs() < 0.1 and abs(part.var().item() - 1 / 3) < 0.04
    many = torch.stack([compute_noise(packed([[60]], 60), step) for step in range(40)])
    correlation = torch.corrcoef(many.flatten(1))
    assert (correlation - torch.eye(40)).abs().max() < 0.15
    assert torch.corrcoef(many[:, 0].flatten(0, 1).T).sub(torch.eye(WIDTH)).abs().max() < 0.1


def test_noise_of_a_document_depends_on_step_seed_and_its_tokens_alone() -> None:
    whole = compute_noise(packed([[7, 3, 5], [4]], 20))
    parts = {7: whole[0, :7], 3: whole[0, 7:10], 5: whole[0, 10:15], 4: whole[1, :4]}
    other = compute_noise(packed([[5], [4, 7], [3]], 16))
    places = {5: (0, 0), 4: (1, 0), 7: (1, 4), 3: (2, 0)}
    for length, (row, start) in places.items():
        torch.testing.assert_close(parts[length], other[row, start : start + length])
    assert not torch.allclose(compute_noise(packed([[7]], 7), step=1)[0], parts[7], atol=1e-2)
    assert not torch.allclose(compute_noise(packed([[7]], 7), seed=1)[0], parts[7], atol=1e-2)
    assert not torch.allclose(parts[7][:3], parts[3], atol=1e-2)


def test_padding_of_labelled_rows_has_none_and_does_not_count() -> None:
    ids = torch.tensor([[3, 4, 5, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    some = torch.zeros(2, 1, dtype=torch.long)
    batch = LabelledBatch(
        ids, some, torch.arange(6).expand(2, -1), torch.tensor([0, -1]), mask, ids, some
    )
    noise = compute_noise(batch)
    alone = Batch(ids[:1, :3], some, torch.arange(3)[None], torch.tensor([0]))
    torch.testing.assert_close(noise[:1, :3], compute_noise(alone))
    assert noise[0, 3:].abs().max() == 0 and noise[1, 1:].abs().max() == 0


def test_embeddings_of_another_shape_are_an_error() -> None:
    model = Words()
    noise = EmbeddingNoise(model, 1.0, 0)
    batch = packed([[4]], 4)
    noise.begin_micro_batch(0, batch.input_ids, batch.measure_documents())
    with pytest.raises(RuntimeError, match="neftune_alpha"):
        model.embedding(torch.zeros(2, 4, dtype=torch.long))


def test_virtual_tokens_have_no_noise(tmp_path: Path) -> None:
    """Inputs of the first block: noisy embeddings behind virtual tokens without noise."""
    adapter = {"kind": "prompt", "num_virtual_tokens": 3}
    tree = tiny_tree(tmp_path, adapter=adapter, data__eval=[], train__neftune_alpha=5)
    config, built, loaders, call = build(World(), tree)
    seen: list[Tensor] = []

    model = cast(Any, built.model)
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0].detach()), with_kwargs=True
    )
    batches, targets = loaders.train.load_step(0)
    for alpha in (5.0, 0.0):
        train = config.train.model_copy(update={"neftune_alpha": alpha})
        step = make_training_step(train, built, call, loaders.objective, World())
        step.accumulate_gradients(0, batches[:1], targets)
        step.close()
    noisy, plain = seen[0], seen[-1]
    length = batches[0].position_ids.shape[1]
    assert noisy.shape[1] >= length + 3
    assert noisy[:, :3].equal(plain[:, :3])
    difference = (noisy - plain)[0, 3:8].abs()
    assert 0 < difference.max() <= 1.000001 * 5 / math.sqrt(6 * noisy.shape[-1])
    assert difference.amax(1).min() > 0
