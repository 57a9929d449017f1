from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from dist_peft.adapters.adapter_format import find_format
from dist_peft.adapters.lokr.format import LokrFormat
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.config.run import LokrConfig
from dist_peft.core.errors import UserError
from tests.support.peft_equality import check_loaded_by_peft, check_read_from_peft

PATH = "base_model.model.m.q_proj"


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 3, "alpha": 9},
        # both matrices of rank 1, those of v_proj trained whole
        {"r": 1, "decompose_both": True, "decompose_factor": 4, "rank_pattern": {"v_proj": 9}},
    ],
    ids=str,
)
def test_peft_loads_the_same_function(settings: dict[str, Any], tmp_path: Path) -> None:
    public = check_loaded_by_peft(tmp_path, LokrConfig, **settings)
    known = find_format(public.config)
    assert isinstance(known, LokrFormat)
    assert known.describe(public.config).startswith(f"LOKR r={settings['r']} alpha=")
    names = {name.rpartition(".")[2] for name in public.tensors}
    if "decompose_both" in settings:
        assert {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a"} <= names


@pytest.mark.parametrize("both", [False, True])
def test_pefts_own_directory_is_read(both: bool, tmp_path: Path) -> None:
    config = peft.LoKrConfig(
        r=2, alpha=5, target_modules=["q_proj", "down_proj"], decompose_both=both
    )
    check_read_from_peft(tmp_path, config)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{PATH}.lokr_w2_b": torch.ones(3, 4)}, r"lokr_w2_b has shape \[3, 4\], not \[2, \*\]"),
        ({f"{PATH}.lokr_w1": torch.ones(3)}, r"lokr_w1 has shape \[3\], not \[\*, \*\]"),
        ({f"{PATH}.lokr_t2": torch.ones(1)}, "lokr_t2 is no LoKr tensor"),
    ],
)
def test_damaged_adapters_are_refused(tensors: dict[str, Any], message: str) -> None:
    own = {
        "lokr_w1": torch.ones(2, 2),
        "lokr_w2_a": torch.ones(3, 2),
        "lokr_w2_b": torch.ones(2, 4),
    }
    whole = {f"{PATH}.{name}": value for name, value in own.items()}
    public = PublicAdapter({"peft_type": "LOKR", "r": 2, "alpha": 2}, {**whole, **tensors})
    with pytest.raises(UserError, match=message):
        LokrFormat().check(public)
