"""Ranks join with the times of the configuration, then compare it."""

from pathlib import Path
from unittest import mock

import torch

from dist_peft.app.rank_setup import join_ranks
from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World
from tests.support.tiny_runs import tiny_tree


def test_ranks_join_before_they_compare(tmp_path: Path) -> None:
    engine = {"timeout_minutes": 3, "start_timeout_minutes": 2, "stall_seconds": 7}
    config = parse_config(tiny_tree(tmp_path, engine=engine))
    calls = mock.Mock()
    with (
        mock.patch.object(World, "join_process_group", calls.join),
        mock.patch.object(World, "check_agreement", calls.agree),
    ):
        assert join_ranks(config, World()) == torch.device("cpu")
    assert [name for name, _, _ in calls.mock_calls] == ["join", "agree"]
    assert calls.join.call_args.args == (torch.device("cpu"), 3, 2)
    assert calls.join.call_args.kwargs == {"stall_seconds": 7, "on_stall": None}
    name, values = calls.agree.call_args.args
    assert name == "configuration" and values["engine.timeout_minutes"] == 3
