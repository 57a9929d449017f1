"""The section ``engine``."""

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
