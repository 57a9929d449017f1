"""Held-out losses of several adapters by one pass are those of each by its own."""

from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch

from dist_peft.adapters.joined.method import JoinedAdapter
from dist_peft.app.data_setup import make_data_loaders
from dist_peft.app.model_setup import build_model, load_weights
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.stop_signals import StopRequested
from dist_peft.core.world import World
from dist_peft.train.evaluate import evaluate_model
from dist_peft.train.joined_evaluation import evaluate_together
from dist_peft.train.joined_step import JoinedStep
from dist_peft.train.objective import TokenObjective
from tests.support.sweep_runs import sweep_tree

CPU = torch.device("cpu")


def test_losses_of_each_point_from_as_many_forwards_as_of_one(tmp_path: Path) -> None:
    """The last point has more held-out records, whose losses are of its last passes alone."""
    resolved = resolve_config(parse_config(sweep_tree(tmp_path)))
    whole = load_weights(build_model(resolved), World(), CPU)
    for name, parameter in whole.model.named_parameters():
        if name.endswith("lora_B"):  # adapters that differ
            torch.manual_seed(sum(name.encode()))
            parameter.data.normal_(std=0.1)
    adapter, objective = cast(JoinedAdapter, whole.setup.adapter), TokenObjective()
    loaders: dict[int, Any] = {}
    for number, point in enumerate(resolved.split_points().values()):
        found = make_data_loaders(point.run, whole.setup.tokenizer, World())
        loaders[number] = found.train if number == 2 else found.eval
    step = JoinedStep(
        *(whole.model, whole.engine, objective, World(), adapter.adapters, adapter.shares)
    )
    forward = type(whole.model).forward
    with mock.patch.object(type(whole.model), "forward", autospec=True) as counted:
        counted.side_effect = forward
        found = evaluate_together(whole.model, loaders, step.compute_statistics, World())
        assert counted.call_count == len(loaders[2].load_all_sequential())
    for number, loader in loaders.items():
        with adapter.shares.give_all(number):
            wanted = evaluate_model(whole.model, whole.engine, objective, loader, World())
        assert found[number].loss == pytest.approx(wanted.loss, rel=1e-6)
    assert len({round(own.loss, 3) for own in found.values()}) == 3
    with (
        mock.patch("dist_peft.core.world.is_stop_requested", return_value=True),
        pytest.raises(StopRequested),
    ):
        evaluate_together(whole.model, loaders, step.compute_statistics, World())
