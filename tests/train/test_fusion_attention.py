"""Measured attention against a row-by-row mean, and what is read back."""

import tempfile
from pathlib import Path

import pytest
import torch

from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.engine.single import SingleEngine
from dist_peft.train.attention_record import FusionAttention
from dist_peft.train.evaluate import inference_mode
from dist_peft.train.fusion_attention import find_fusion_layers, measure_attention
from dist_peft.train.objective import TokenObjective
from tests.support.adapters import disturb, tiny_llama
from tests.support.dist import run_ranks
from tests.support.fusions import NAMES, fused, save_adapters
from tests.support.row_sets import UnevenRows, make_loader

CPU = torch.device("cpu")
ROWS = UnevenRows([1, 9, 3, 14, 2])


class SmallRows(UnevenRows):
    """Tokens that the tiny Llama has."""

    def get_sequence(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens, labels, positions = super().get_sequence(index)
        return tokens % 60, torch.where(labels < 0, labels, labels % 60), positions


def _measured(world: World, micro: int) -> FusionAttention:
    with tempfile.TemporaryDirectory() as directory:
        adapters = save_adapters(Path(directory), placement="houlsby")
        model, _ = fused(adapters)
    disturb(model)
    rows = SmallRows(ROWS.counts)
    loader = make_loader(rows, 4, micro, world.rank, world.size)
    layers = find_fusion_layers(model)
    found = measure_attention(model, layers, SingleEngine(CPU), TokenObjective(), loader, world)
    if world.size == 1:
        total = torch.zeros(len(layers), len(NAMES))
        for layer in layers.values():
            layer.register_forward_hook(_note)
        for index in range(len(rows)):
            tokens, labels, _ = rows.get_sequence(index)
            with inference_mode(model):
                model(input_ids=tokens[None])
            total += torch.stack([_SEEN[path][0, labels >= 0].sum(0) for path in layers])
        torch.testing.assert_close(
            torch.tensor(found.attention), total / sum(rows.counts), rtol=1e-4, atol=1e-5
        )
    return found


_SEEN: dict[str, torch.Tensor] = {}


def _note(layer, args, output):  # type: ignore[no-untyped-def]
    h = layer.adapters[0].select_adapter_input(*args)
    outputs = torch.stack([adapter.compute_residual(h) for adapter in layer.adapters], -2)
    _SEEN[layer.path] = layer._compute_attention(h, outputs)


@pytest.mark.dist
def test_mean_over_all_targets_at_any_number_of_ranks() -> None:
    """Five rows on two ranks: one has a filler row, which counts for nothing."""
    alone = _measured(World(), 2)
    assert alone.adapters == list(NAMES) and alone.tokens == sum(ROWS.counts)
    assert alone.counted == "target tokens" and alone.by_task == {}
    assert alone.format_layer_labels() == ["0 attention", "0 MLP", "1 attention", "1 MLP"]
    assert all(sum(row) == pytest.approx(1, abs=1e-5) for row in alone.attention)
    for other in run_ranks(_measured, 2, 1):
        assert other.layers == alone.layers and other.tokens == alone.tokens
        torch.testing.assert_close(torch.tensor(other.attention), torch.tensor(alone.attention))


def test_read_as_written(tmp_path: Path) -> None:
    assert FusionAttention.read_json(tmp_path) is None
    layers = ["bert.encoder.layer.7.output.output_adapters"]
    made = FusionAttention(["a", "b"], layers, "tokens", 3, [[0.25, 0.75]], {"x": [[0.5, 0.5]]})
    made.write_json(tmp_path)
    assert FusionAttention.read_json(tmp_path) == made and made.format_layer_labels() == ["7"]
    assert find_fusion_layers(tiny_llama()) == {}
    (tmp_path / "fusion_attention.json").write_text('{"adapters": []}')
    with pytest.raises(UserError, match=r"fusion_attention\.json is damaged"):
        FusionAttention.read_json(tmp_path)
