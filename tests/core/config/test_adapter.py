"""Adapter settings that belong together, or to another setting."""

from typing import Any

import pytest
from pydantic import TypeAdapter

from dist_peft.core.config.adapter import (
    AdapterConfig,
    BottleneckConfig,
    FullConfig,
    FusionConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
)

ADAPTER: TypeAdapter[Any] = TypeAdapter(AdapterConfig)


def test_kind_chooses_the_method() -> None:
    for kind, section in (
        ("prompt", PromptConfig),
        ("ptuning", PTuningConfig),
        ("prefix", PrefixConfig),
        ("bottleneck", BottleneckConfig),
        ("full", FullConfig),
    ):
        found = ADAPTER.validate_python({"kind": kind})
        assert type(found) is section
        # a resolved file names every key
        assert ADAPTER.validate_python(found.model_dump()) == found


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"kind": "prompt", "init": "text"}, "init: text and init_text belong together"),
        ({"kind": "prompt", "init_text": "a"}, "init: text and init_text belong together"),
        ({"kind": "prompt", "num_virtual_tokens": 0}, "greater than or equal to 1"),
        ({"kind": "ptuning", "dropout": 0.1}, "dropout is for encoder: lstm"),
        ({"kind": "ptuning", "encoder_layers": 3}, "encoder_layers is for encoder: lstm"),
        (
            {"kind": "ptuning", "encoder": "lstm", "encoder_layers": 1, "dropout": 0.1},
            "dropout is between the LSTM's layers",
        ),
        (
            {"kind": "prefix", "projection": False, "encoder_hidden_size": 8},
            "encoder_hidden_size is for projection: true",
        ),
        ({"kind": "full", "parts": ["all"]}, "Extra inputs are not permitted"),
        ({"kind": "prefix", "r": 8}, "Extra inputs are not permitted"),
    ],
)
def test_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ADAPTER.validate_python(wrong)


def test_stages_are_in_order() -> None:
    later = [{"step": 9, "parts": ["all"]}, {"step": 0, "parts": ["norms"]}]
    found = ADAPTER.validate_python({"kind": "partial", "last_blocks": 2, "unfreeze": later})
    assert [(s.step, s.parts, s.last_blocks) for s in found.unfreeze_stages] == [
        (0, [], 2),
        (0, ["norms"], 0),
        (9, ["all"], 0),
    ]
    assert ADAPTER.validate_python(found.model_dump()) == found
    assert [(s.step, s.parts) for s in FullConfig().unfreeze_stages] == [(0, ["all"])]


def test_bottleneck_defaults_are_the_placements() -> None:
    found = ADAPTER.validate_python({"kind": "bottleneck", "placement": "parallel", "scaling": 1.5})
    assert (found.reduction_factor, found.scaling, found.init) == (2.0, 1.5, "mam_adapter")
    assert ADAPTER.validate_python(found.model_dump()) == found
    assert BottleneckConfig(placement="houlsby").activation == "swish"
    assert BottleneckConfig().activation == "relu"
    with pytest.raises(ValueError, match="placement"):
        ADAPTER.validate_python({"kind": "bottleneck", "placement": ["houlsby"]})


def test_width_of_a_bottleneck() -> None:
    assert BottleneckConfig(reduction_factor=16).bottleneck_size(4096) == 256
    assert BottleneckConfig(reduction_factor=2.5).bottleneck_size(64) == 25
    assert BottleneckConfig(reduction_factor=128).bottleneck_size(64) == 1


def test_fused_adapters_have_names() -> None:
    """That of the directory, or of the run or task whose adapter/ it is; a resolved file has it."""
    paths = ["hub/rte", "runs/tasks/mrpc/adapter", {"path": "x.y", "name": "third"}]
    found = ADAPTER.validate_python({"kind": "fusion", "adapters": paths})
    assert isinstance(found, FusionConfig)
    assert [adapter.display_name for adapter in found.adapters] == ["rte", "mrpc", "third"]
    assert ADAPTER.validate_python(found.model_dump()) == found


@pytest.mark.parametrize(
    ("adapters", "words"),
    [
        (["a"], "at least 2 items"),
        (["a", "b/a"], "two of adapters are called a"),
        (["a", "b.c"], "the name 'b.c' of b.c must be of letters"),
    ],
)
def test_fused_adapters_refused(adapters: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ADAPTER.validate_python({"kind": "fusion", "adapters": adapters})
