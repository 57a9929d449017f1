"""Configuration section -> adapter method."""

import torch

from dist_peft.adapters.bottleneck.method import BottleneckAdapter
from dist_peft.adapters.full.method import PartialAdapter
from dist_peft.adapters.fusion.method import FusionAdapter
from dist_peft.adapters.ia3.method import Ia3Adapter
from dist_peft.adapters.lora.method import LoraAdapter
from dist_peft.adapters.no_adapter import NoAdapter
from dist_peft.adapters.protocol import Adapter
from dist_peft.adapters.qalora.method import QaLoraAdapter
from dist_peft.adapters.virtual_tokens.p_tuning import PTuningAdapter
from dist_peft.adapters.virtual_tokens.prefix_tuning import PrefixAdapter
from dist_peft.adapters.virtual_tokens.prompt_tuning import PromptTuningAdapter
from dist_peft.core.config.run import (
    AdapterConfig,
    BottleneckConfig,
    FullConfig,
    FusionConfig,
    Ia3Config,
    LoraConfig,
    PartialConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    QaLoraConfig,
)

__all__ = ["make_adapter"]


def make_adapter(config: AdapterConfig, *, seed: int, arithmetic: torch.dtype) -> Adapter:
    """The method that ``config.kind`` names.

    Args:
        config: the ``adapter`` section.
        seed: ``train.seed``: start values and dropout.
        arithmetic: type in which adapters compute; their parameters are always float32, and so is
            the arithmetic of IA3 and of those with virtual tokens.
    """
    if isinstance(config, LoraConfig):
        return LoraAdapter(config, seed=seed, arithmetic=arithmetic)
    if isinstance(config, QaLoraConfig):
        return QaLoraAdapter(config, seed=seed, arithmetic=arithmetic)
    if isinstance(config, Ia3Config):
        return Ia3Adapter(config)
    if isinstance(config, PromptConfig):
        return PromptTuningAdapter(config, seed=seed)
    if isinstance(config, PTuningConfig):
        return PTuningAdapter(config, seed=seed)
    if isinstance(config, PrefixConfig):
        return PrefixAdapter(config, seed=seed)
    if isinstance(config, BottleneckConfig):
        return BottleneckAdapter(config, seed=seed, arithmetic=arithmetic)
    if isinstance(config, FusionConfig):
        return FusionAdapter(config, seed=seed, arithmetic=arithmetic)
    if isinstance(config, FullConfig | PartialConfig):
        return PartialAdapter(config, arithmetic=arithmetic)
    return NoAdapter()
