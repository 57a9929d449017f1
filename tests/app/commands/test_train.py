"""``dist-peft train`` refuses before the ranks meet."""

from pathlib import Path
from unittest import mock

import pytest

from dist_peft.app.commands.train import train_from_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from tests.support.tiny_runs import tiny_tree


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"kind": "none"}}, r"adapter\.kind is none"),
        ({"train__tasks": "separate"}, r"train\.tasks is separate, but data\.train has one source"),
    ],
)
def test_nothing_to_train_is_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    config = parse_config(tiny_tree(tmp_path, **changes))
    with (
        mock.patch.object(World, "join_process_group", side_effect=AssertionError),
        pytest.raises(UserError, match=message),
    ):
        train_from_config(config, World())
    assert not (tmp_path / "run").exists()
