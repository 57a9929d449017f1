from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from dist_peft.adapters.adapter_format import find_format
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.adapters.vera.format import VeraFormat, VeraMerger
from dist_peft.core.config.run import VeraConfig
from dist_peft.core.errors import UserError
from tests.support.peft_equality import check_loaded_by_peft, check_read_from_peft

PATH = "base_model.model.m.q_proj"


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 7},
        {"r": 5, "save_projection": False, "projection_seed": 3},
        # one layer alone: last components would mean the other layer, too
        {"r": 3, "target_modules": [r".*layers\.1.*down_proj", "v_proj"]},
    ],
    ids=str,
)
def test_peft_loads_the_same_function(settings: dict[str, Any], tmp_path: Path) -> None:
    public = check_loaded_by_peft(tmp_path, VeraConfig, **settings)
    saved = settings.get("save_projection", True)
    assert ("base_model.vera_A" in public.tensors) == saved
    known = find_format(public.config)
    assert isinstance(known, VeraFormat)
    assert known.describe(public.config) == (
        f"VERA r={settings['r']} projections={'saved' if saved else 'from their seed'}"
    )


@pytest.mark.parametrize("saved", [True, False])
def test_pefts_own_directory_is_read(saved: bool, tmp_path: Path) -> None:
    config = peft.VeraConfig(
        r=6, target_modules=["q_proj", "down_proj"], save_projection=saved, projection_prng_key=5
    )
    check_read_from_peft(tmp_path, config)


def public(changes: dict[str, Any], tensors: dict[str, Any]) -> PublicAdapter:
    own = {
        f"{PATH}.vera_lambda_b": torch.ones(4),
        f"{PATH}.vera_lambda_d": torch.ones(2),
        "base_model.vera_A": torch.ones(2, 3),
        "base_model.vera_B": torch.ones(4, 2),
    }
    found = {name: value for name, value in {**own, **tensors}.items() if value is not None}
    return PublicAdapter({"peft_type": "VERA", "r": 2, **changes}, found)


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({}, {"base_model.vera_A": None}, "vera_A is absent; save_projection .* rank 2"),
        ({}, {"base_model.vera_B": torch.ones(4, 3)}, r"vera_B has shape \[4, 3\]"),
        ({}, {"base_model.vera_B": torch.ones(3, 2)}, "vera_B has 3 rows, and a module has 4"),
        ({}, {f"{PATH}.vera_lambda_d": torch.ones(3)}, r"vera_lambda_d has shape \[3\], not \[2\]"),
        ({}, {f"{PATH}.vera_lambda_b": None}, "vera_lambda_b is absent"),
        ({"r": "2"}, {}, "no usable r and projection_prng_key: '2'"),
        ({"bias": "all"}, {}, "trained with bias"),
        ({"modules_to_save": ["x"]}, {}, "trained with modules_to_save"),
    ],
)
def test_damaged_adapters_are_refused(
    changes: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        VeraFormat().check(public(changes, tensors))


def test_wider_base_is_refused() -> None:
    merger = VeraMerger(public({}, {}))
    merger.check_weight_shapes({"m.q_proj.weight": (4, 3)})
    with pytest.raises(UserError, match="4 columns, and the adapter's projection vera_A is for at"):
        merger.check_weight_shapes({"m.q_proj.weight": (4, 4)})
