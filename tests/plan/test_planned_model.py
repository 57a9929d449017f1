import shutil
from pathlib import Path

import pytest

from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import UserError
from dist_peft.plan.planned_model import build_planned_model
from tests.support.live_storage import odd_tree, save_odd_base


def test_config_json_alone_gives_the_same_shapes(tmp_path: Path) -> None:
    base = save_odd_base(tmp_path / "base")
    real = build_planned_model(parse_config(odd_tree(base)))
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(base / "config.json", bare)
    shapes = {n: p.shape for n, p in real.skeleton.model.named_parameters()}
    absent = parse_config(odd_tree(Path("org/not-downloaded")))
    for planned in (
        build_planned_model(parse_config(odd_tree(bare))),
        build_planned_model(absent, bare / "config.json"),
        build_planned_model(absent, bare),
    ):
        assert {n: p.shape for n, p in planned.skeleton.model.named_parameters()} == shapes
        assert planned.source == str(bare / "config.json")


def test_no_description_of_the_base(tmp_path: Path) -> None:
    config = parse_config(odd_tree(tmp_path))
    with pytest.raises(UserError, match=r"has no config\.json"):
        build_planned_model(config)
    with pytest.raises(UserError, match=r"--base-config .*absent does not exist"):
        build_planned_model(config, tmp_path / "absent")
