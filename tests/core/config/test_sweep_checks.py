"""Options that a sweep refuses, each with its reason."""

from typing import Any

import pytest

from dist_peft.core.config.io import parse_config
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
        ({"adapter": {"kind": "ia3"}}, "sweep: adapter.kind ia3 has no product of its own"),
        ({"adapter": {"init": "pissa"}}, "sweep: adapter.init pissa derives its start"),
        ({"adapter": {"use_dora": True}}, "sweep: adapter.use_dora True multiplies"),
        ({"engine": {"kind": "zero"}}, "sweep: engine.kind zero has one optimizer"),
        ({"train": {"exact": True}}, "sweep: train.exact True promises the bits"),
        ({"train": {"neftune_alpha": 5}}, "sweep: train.neftune_alpha 5.0 adds noise"),
        ({"train": {"tasks": "separate"}}, "sweep: train.tasks separate trains its adapters"),
        ({"save": {"track": ["mlflow"]}}, "sweep: save.track a section can follow one run"),
        ({"resume": "runs/a/checkpoints/step-000001"}, "sweep: resume runs/a.* names a checkpoint"),
        ({"sweep": {"halving": {"every": 4}}}, "sweep.halving compares held-out losses"),
    ],
)
def test_refused_with_the_reason(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(tree(**sections))
    assert parse_config(tree()).sweep is not None


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
