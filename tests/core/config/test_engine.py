"""The section ``engine``."""

from typing import Any

import pytest
from pydantic import ValidationError

from dist_peft.core.config.engine import EngineConfig
from dist_peft.quant.kept_results import KEPT_KINDS


def test_values_of_keep_results_are_those_of_the_kernels() -> None:
    for value in KEPT_KINDS:
        assert EngineConfig.model_validate({"keep_results": value}).keep_results == value
    with pytest.raises(ValidationError, match="'none', 'attention' or 'products'"):
        EngineConfig.model_validate({"keep_results": "all"})


def test_defaults_keep_inputs_alone_on_the_device() -> None:
    found = EngineConfig()
    assert found.activation_checkpointing and not found.offload_inputs
    assert found.keep_results == "none"


@pytest.mark.parametrize(
    "other", [{"activation_checkpointing": False}, {"keep_results": "products"}]
)
def test_decodes_are_shared_where_recomputation_decodes(other: dict[str, Any]) -> None:
    kept = EngineConfig.model_validate({"share_decodes": True, "keep_results": "attention"})
    assert kept.share_decodes
    with pytest.raises(ValidationError, match=f"share_decodes .*{next(iter(other))}"):
        EngineConfig.model_validate({"share_decodes": True, **other})
