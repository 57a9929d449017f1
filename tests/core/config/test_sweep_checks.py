"""Options that a sweep refuses, each with its reason."""

from typing import Any

import pytest

from dist_peft.core.config.io import parse_config
from dist_peft.core.config.run import SweepPoint
from dist_peft.core.config.sweep import apply_point
from dist_peft.core.errors import UserError


def tree(**sections: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "base": {"path": "b"},
        "data": {"train": ["x.jsonl"]},
        "sweep": {"lr": [1e-3, 1e-4]},
    }
    for name, section in sections.items():
        found[name] = {**found.get(name, {}), **section} if isinstance(section, dict) else section
    return found


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"adapter": {"kind": "bottleneck"}}, "adapter.kind bottleneck has no product of its own"),
        ({"adapter": {"init": "eva"}}, "sweep: adapter.init eva derives its start"),
        ({"adapter": {"init": "loftq"}, "sweep": {"r": [2, 4]}}, "different r; with adapter.init"),
        ({"adapter": {"kind": "loha"}, "sweep": {"lr_ratio": [2, 4]}}, "0 has lr_ratio, not a key"),
        (
            {"sweep": {"points": [{}, {"data": [{"path": "a", "labels": ["x", "y"]}]}]}},
            "labels are for format: classification",
        ),
        (
            {"sweep": {"lr": [], "data": [["a"], [{"path": "b", "format": "classification"}]]}},
            r"sweep: point 1: data: train\[0\].labels is missing",
        ),
        (
            {
                "data": {"train": ["a"], "val_split": 0.1},
                "train": {"eval_every": 2},
                "sweep": {"lr": [], "data": [["a"], ["b"]], "halving": {"every": 4}},
            },
            "points of other data have other held-out records",
        ),
        ({"train": {"neftune_alpha": 5}}, "sweep: train.neftune_alpha 5.0 adds noise"),
        ({"train": {"tasks": "separate"}}, "sweep: train.tasks separate trains its adapters"),
        ({"save": {"track": ["mlflow", "trackio"]}}, "sweep: save.track trackio follows one run"),
        ({"resume": "runs/a/checkpoints/step-000001"}, "sweep: resume runs/a.* names a checkpoint"),
        ({"sweep": {"halving": {"every": 4}}}, "sweep.halving compares held-out losses"),
    ],
)
def test_refused_with_the_reason(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(tree(**sections))
    assert parse_config(tree()).sweep is not None


def test_each_key_of_a_point_goes_to_its_section() -> None:
    point = SweepPoint(lr=1e-3, weight_decay=0.1, dropout=0.2, use_rslora=True, data="b.jsonl")
    changes = apply_point(point)
    assert changes["train"] == {"lr": 1e-3, "weight_decay": 0.1}
    assert changes["adapter"] == {"dropout": 0.2, "use_rslora": True}
    assert [source.path for source in changes["data"]["train"]] == ["b.jsonl"]


def test_halving_needs_evaluations_at_its_choices() -> None:
    held_out = {"data": {"train": ["x.jsonl"], "eval": ["y.jsonl"]}}
    halving = {"sweep": {"lr": [1e-3, 1e-4], "halving": {"every": 4}}}
    for eval_every, good in ((2, True), (3, False), (0, False)):
        given = tree(**held_out, **halving, train={"eval_every": eval_every})
        if good:
            parse_config(given)
        else:
            with pytest.raises(UserError, match="eval_every that divides its every, 4"):
                parse_config(given)
