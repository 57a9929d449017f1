from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from dist_peft.adapters.adapter_format import find_format
from dist_peft.adapters.loha.format import LohaFormat
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.config.run import LohaConfig
from dist_peft.core.errors import UserError
from tests.support.peft_equality import check_loaded_by_peft, check_read_from_peft

PATH = "base_model.model.m.q_proj"


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 3, "alpha": 30},
        {"r": 16, "alpha": 100, "rank_pattern": {"v_proj": 5}, "alpha_pattern": {"o_proj": 200.5}},
    ],
    ids=str,
)
def test_peft_loads_the_same_function(settings: dict[str, Any], tmp_path: Path) -> None:
    public = check_loaded_by_peft(tmp_path, LohaConfig, **settings)
    known = find_format(public.config)
    assert isinstance(known, LohaFormat)
    r, alpha = settings["r"], settings["alpha"]
    assert known.describe(public.config) == f"LOHA r={r} alpha={alpha}"


def test_pefts_own_directory_is_read(tmp_path: Path) -> None:
    config = peft.LoHaConfig(r=3, alpha=40, target_modules=["q_proj", "down_proj"],
                             rank_pattern={"down_proj": 2})  # fmt: skip
    check_read_from_peft(tmp_path, config)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (
            {f"{PATH}.hada_w2_b": torch.ones(2, 4)},
            {},
            r"hada_w2_b has shape \[2, 4\], not \[2, 5\]",
        ),
        ({f"{PATH}.hada_t1": torch.ones(2, 2, 1, 1)}, {}, "hada_t1 is no LoHa tensor"),
        ({}, {"r": None}, "gives m.q_proj no usable r and alpha"),
    ],
)
def test_damaged_adapters_are_refused(
    tensors: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    own = {f"{PATH}.hada_w{n}_a": torch.ones(3, 2) for n in (1, 2)}
    own |= {f"{PATH}.hada_w{n}_b": torch.ones(2, 5) for n in (1, 2)}
    public = PublicAdapter({"peft_type": "LOHA", "r": 2, "alpha": 2, **config}, {**own, **tensors})
    with pytest.raises(UserError, match=message):
        LohaFormat().check(public)
