import shutil
from pathlib import Path

import pytest
import torch

from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import UserError
from dist_peft.plan.planned_model import build_planned_model
from tests.support.live_storage import (
    odd_classifier_tree,
    odd_tree,
    save_odd_base,
    save_odd_bert,
)


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


def test_config_json_of_a_classifier(tmp_path: Path) -> None:
    """Its trunk's shapes; the head is new, in float32, whatever the file says of classes."""
    for base in (save_odd_base(tmp_path / "llama"), save_odd_bert(tmp_path / "bert")):
        real = build_planned_model(parse_config(odd_classifier_tree(base)))
        bare = tmp_path / f"bare {base.name}"
        bare.mkdir()
        shutil.copy(base / "config.json", bare)
        planned = build_planned_model(parse_config(odd_classifier_tree(bare)))
        shapes, expected = (
            {n: (p.shape, p.dtype, p.requires_grad) for n, p in m.skeleton.model.named_parameters()}
            for m in (planned, real)
        )
        assert shapes == expected
        assert any(shape[0] == 3 and dtype == torch.float32 for shape, dtype, _ in shapes.values())


def test_no_description_of_the_base(tmp_path: Path) -> None:
    config = parse_config(odd_tree(tmp_path))
    with pytest.raises(UserError, match=r"has no config\.json"):
        build_planned_model(config)
    with pytest.raises(UserError, match=r"--base-config .*absent does not exist"):
        build_planned_model(config, tmp_path / "absent")
