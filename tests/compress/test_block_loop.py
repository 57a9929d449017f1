"""The loop over blocks: what each block sees, and stopping."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dist_peft.app.model_setup import build_model, load_weights
from dist_peft.app.quantized_base import load_calibration_sequences
from dist_peft.app.resolved_config import resolve_pruning
from dist_peft.compress.block_loop import BlockLoop
from dist_peft.core.config.io import parse_config
from dist_peft.core.stop_signals import StopRequested
from dist_peft.core.world import World
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.store.reader import RowReader
from tests.support.pruning_runs import CALIBRATION, make_pruning_tree


class SumLoop(BlockLoop):
    """Remember the sums of the first linear of each block."""

    label, advice = "sums", "use another model"

    def _solve_block(self, number: int, block: nn.Module) -> None:
        linear = next(m for m in block.modules() if isinstance(m, FrozenLinear))
        whole = self._compute_hessian(block, number, linear).mean_hessian()
        diagonal = self._compute_hessian(block, number, linear, diagonal=True).mean_hessian()
        ratio = whole.diagonal() / diagonal  # another unit
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-5, atol=0)
        solved.append(number)


solved: list[int] = []


def test_sums_of_squares_are_the_diagonal_and_a_stop_ends_the_loop(tmp_path: Path) -> None:
    setup = build_model(resolve_pruning(parse_config(make_pruning_tree(tmp_path))))
    engine = load_weights(setup, World(), torch.device("cpu")).engine
    windows = load_calibration_sequences(setup, World(), CALIBRATION)
    stops = iter([False] * 4 + [True])  # after each of three samples, before each block
    solved.clear()
    with torch.no_grad(), RowReader(setup.skeleton.index) as reader:
        loop = SumLoop(setup.skeleton, engine, windows, World(), reader, lambda: next(stops))
        with pytest.raises(StopRequested):
            loop.solve_all_blocks()
    assert solved == [0]
