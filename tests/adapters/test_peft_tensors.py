from typing import Any

import pytest
import torch
from torch import Tensor

from dist_peft.adapters.peft_tensors import (
    build_linears_config,
    build_rank_config,
    check_tensor_shape,
    describe_rank_config,
    group_peft_tensors,
    name_module_tensors,
    read_rank_and_alpha,
    to_json_number,
)
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.config.run import LohaConfig
from dist_peft.core.errors import UserError

KEY = "base_model.model.a.b.w"


def group(tensors: dict[str, Tensor], **config: Any) -> dict[str, dict[str, Tensor]]:
    return group_peft_tensors(PublicAdapter(config, tensors), ("w",), "LoHa", whole_adapter=("s",))


def test_grouped_and_named_again() -> None:
    value = torch.ones(2)
    found = group({KEY: value, "base_model.s": value})
    assert found == {"a.b": {"w": value}}
    assert list(name_module_tensors(found)) == [KEY]


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({KEY + "2": torch.ones(1)}, {}, "is no LoHa tensor"),
        ({"model.a.w": torch.ones(1)}, {}, "is no LoHa tensor"),
        ({"base_model.model.w": torch.ones(1)}, {}, "is no LoHa tensor"),
        ({KEY: torch.ones(0)}, {}, "is empty"),
        ({}, {}, "has no tensors"),
        ({KEY: torch.ones(1)}, {"modules_to_save": ["h"]}, "trained with modules_to_save"),
    ],
)
def test_refused(tensors: dict[str, Tensor], config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        group(tensors, **config)


def test_shapes_are_checked_and_values_float32() -> None:
    own = {"w": torch.ones(2, 3, dtype=torch.float16)}
    assert check_tensor_shape("a", own, "w", (2, None)).dtype == torch.float32
    with pytest.raises(UserError, match=r"a\.w has shape \[2, 3\], not \[2, \*, 1\]"):
        check_tensor_shape("a", own, "w", (2, None, 1))
    with pytest.raises(UserError, match=r"a\.v is absent"):
        check_tensor_shape("a", own, "v", (2,))


def test_ranks_of_a_configuration() -> None:
    config = LohaConfig(r=4, alpha=6.5, rank_pattern={"b": 2}, alpha_pattern={"b": 3.0})
    public = {**build_linears_config("LOHA", ["b", "c"], "hub/base"), **build_rank_config(config)}
    assert public["base_model_name_or_path"] == "hub/base" and public["target_modules"] == [
        "b",
        "c",
    ]
    assert read_rank_and_alpha("a.b", public) == (2, 3.0)
    assert read_rank_and_alpha("a.c", public) == (4, 6.5)
    assert describe_rank_config(public) == "LOHA r=4 alpha=6.5"
    for broken in (
        {},
        {"r": 0, "alpha": 1},
        {"r": 1, "alpha": float("inf")},
        {"r": "x", "alpha": 1},
    ):
        with pytest.raises(UserError, match=r"gives a\.b no usable r and alpha"):
            read_rank_and_alpha("a.b", broken)
    assert repr(to_json_number(3.0)) == "3" and repr(to_json_number(3.5)) == "3.5"
