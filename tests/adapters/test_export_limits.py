"""Limits of each method, asked without a model."""

import pytest
import torch

from dist_peft.adapters.export_limits import ExportLimits
from dist_peft.adapters.method_table import make_adapter
from dist_peft.core.config.adapter import (
    AdaLoraConfig,
    BottleneckConfig,
    FullConfig,
    Ia3Config,
    LohaConfig,
    LokrConfig,
    LoraConfig,
    PrefixConfig,
    PTuningConfig,
    QaLoraConfig,
    VeraConfig,
)
from dist_peft.core.config.types import ConfigSection


def limits(config: ConfigSection, *, tied: bool = False) -> ExportLimits:
    adapter = make_adapter(config, seed=0, arithmetic=torch.float32)  # type: ignore[arg-type]
    return adapter.get_export_limits(tied)


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        (LoraConfig(), set()),
        (QaLoraConfig(), set()),
        (AdaLoraConfig(), set()),
        (VeraConfig(), set()),
        (LohaConfig(), set()),
        (LokrConfig(), set()),
        (Ia3Config(), set()),
        (PrefixConfig(), {"merged", "separate"}),
        (PTuningConfig(), {"merged", "separate"}),
        (PTuningConfig(pseudo_token="<p>"), {"merged", "separate", "adapter"}),
        (BottleneckConfig(), {"merged", "separate", "adapter"}),
        (FullConfig(), {"separate", "adapter"}),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_contents_that_a_method_cannot_have(config: ConfigSection, refused: set[str]) -> None:
    found = limits(config)
    contents = ("merged", "separate", "adapter")
    assert {content for content in contents if found.get_reason(content)} == refused
    assert found.fits_zero_points == isinstance(config, QaLoraConfig)
    without = (Ia3Config, VeraConfig, LohaConfig, LokrConfig)
    assert (found.gptq_linears is not None) == isinstance(config, without)
    assert (found.bnb_linears is not None) == isinstance(config, LohaConfig | LokrConfig)


def test_adapted_embedding_of_a_tied_base_is_not_merged() -> None:
    config = LoraConfig(embeddings=True)
    assert limits(config) == ExportLimits()
    tied = limits(config, tied=True)
    assert tied.merged is not None and "adapter.embeddings: false" in tied.merged
    assert tied.separate is None and tied.adapter is None
