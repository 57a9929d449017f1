"""Block influence: equal to the cosines of transformers' hidden states, and what is dropped."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dist_peft.app.model_setup import build_model, load_weights
from dist_peft.app.quantized_base import load_calibration_sequences
from dist_peft.app.resolved_config import resolve_pruning
from dist_peft.compress.block_influence import (
    count_dropped_blocks,
    measure_block_influence,
    select_kept_blocks,
)
from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.quant.sparsity import Sparsity
from tests.support.pruning_runs import CALIBRATION, make_pruning_tree


@torch.no_grad()
def test_influence_is_one_minus_the_mean_cosine_of_hidden_states(tmp_path: Path) -> None:
    setup = build_model(resolve_pruning(parse_config(make_pruning_tree(tmp_path))))
    engine = load_weights(setup, World(), torch.device("cpu")).engine
    windows = load_calibration_sequences(setup, World(), CALIBRATION)
    found = measure_block_influence(setup.skeleton, engine, windows, World())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model.model.norm = torch.nn.Identity()  # hidden_states[-1] is after it
    states = model(input_ids=windows, output_hidden_states=True).hidden_states
    assert len(found) == 2
    for number, value in enumerate(found):
        before, after = states[number].double(), states[number + 1].double()
        cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        assert value == pytest.approx(1 - float(cosine.mean()), abs=1e-6)


def test_the_least_influential_blocks_are_dropped() -> None:
    assert select_kept_blocks([0.5, 0.1, 0.3, 0.1, 0.9], 2) == [0, 2, 4]
    assert select_kept_blocks([0.1, 0.1, 0.1], 1) == [1, 2]


def test_number_of_dropped_blocks() -> None:
    assert [count_dropped_blocks(Sparsity(share), 5) for share in (0.2, 0.25, 0.8)] == [1, 1, 4]
    with pytest.raises(UserError, match=r"drops 5 of 5 blocks; .* from 0\.2 to 0\.8"):
        count_dropped_blocks(Sparsity(0.95), 5)
    with pytest.raises(UserError, match="is a pattern of weights"):
        count_dropped_blocks(Sparsity.parse("2:4"), 5)
