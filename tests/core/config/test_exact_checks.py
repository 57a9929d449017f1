"""Options that ``train.exact`` refuses, each with its reason."""

from typing import Any

import pytest

from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import UserError


def tree(**sections: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "base": {"path": "b"},
        "data": {"train": ["x.jsonl"]},
        "train": {"exact": True},
    }
    for name, section in sections.items():
        found[name] = {**found.get(name, {}), **section}
    return found


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("train", {"optimizer": "adamw8bit"}, "train.optimizer adamw8bit shares a scale"),
        ("engine", {"shard_group": 2}, "engine.shard_group 2 adds up the sums of groups"),
        ("engine", {"cpu_offload": "optimizer"}, "engine.cpu_offload optimizer computes norms"),
        ("engine", {"deepspeed_config": "d.json"}, "engine.deepspeed_config d.json may change"),
        ("base", {"attention": "flash_attention_2"}, "base.attention flash_attention_2 is a libr"),
        ("adapter", {"init": "pissa"}, "adapter.init pissa finds its factors by float sums"),
    ],
)
def test_refused_with_the_reason(section: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"train.exact: {message}.*train.exact: false"):
        parse_config(tree(**{section: values}))
    floats = tree(**{section: values})
    floats["train"] = {**floats["train"], "exact": False}
    assert not parse_config(floats).train.exact


def test_others_are_allowed() -> None:
    for adapter in ({"init": "eva"}, {"kind": "ia3"}, {"kind": "prompt", "init": "vocab"}):
        assert parse_config(tree(adapter=adapter)).train.exact
