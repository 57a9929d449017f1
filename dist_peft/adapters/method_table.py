"""Configuration section -> adapter method, and around it the head of a classifier."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dist_peft.adapters.adalora.method import AdaLoraAdapter
from dist_peft.adapters.bottleneck.method import BottleneckAdapter
from dist_peft.adapters.classifier_head.method import (
    add_classifier_head,
    choose_discriminator_size,
)
from dist_peft.adapters.classifier_head.router import RouterAdapter
from dist_peft.adapters.directory import read_adapter_directory
from dist_peft.adapters.full.method import PartialAdapter
from dist_peft.adapters.fusion.method import FusionAdapter
from dist_peft.adapters.ia3.method import Ia3Adapter
from dist_peft.adapters.joined.method import JoinedAdapter
from dist_peft.adapters.loha.method import LohaAdapter
from dist_peft.adapters.lokr.method import LokrAdapter
from dist_peft.adapters.lora.method import LoraAdapter
from dist_peft.adapters.low_rank.method import LinearsAdapter
from dist_peft.adapters.protocol import Adapter, AdapterDefaults, PublicAdapter
from dist_peft.adapters.qalora.method import QaLoraAdapter
from dist_peft.adapters.vera.method import VeraAdapter
from dist_peft.adapters.virtual_tokens.p_tuning import PTuningAdapter
from dist_peft.adapters.virtual_tokens.prefix_tuning import PrefixAdapter
from dist_peft.adapters.virtual_tokens.prompt_tuning import PromptTuningAdapter
from dist_peft.core.config.run import (
    AdaLoraConfig,
    AdapterConfig,
    BottleneckConfig,
    FullConfig,
    FusionConfig,
    Ia3Config,
    LinearsConfig,
    LohaConfig,
    LokrConfig,
    LoraConfig,
    PartialConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    QaLoraConfig,
    RunConfig,
    VeraConfig,
)
from dist_peft.core.errors import UserError
from dist_peft.model.skeleton import Skeleton, parse_torch_dtype

__all__ = ["NoAdapter", "assemble_adapter", "assemble_joined", "make_adapter"]

_ON_LINEARS: dict[type[LinearsConfig], Callable[..., LinearsAdapter[Any, Any]]] = {
    LoraConfig: LoraAdapter,
    QaLoraConfig: QaLoraAdapter,
    VeraConfig: VeraAdapter,
    LohaConfig: LohaAdapter,
    LokrConfig: LokrAdapter,
    AdaLoraConfig: AdaLoraAdapter,
}
"""Methods that are built alike."""


class NoAdapter(AdapterDefaults):
    """The method ``none``: the bare base, for evaluation."""

    def attach_to_model(self, model: nn.Module) -> None:
        pass

    def begin_micro_batch(self, step: int, sample_ids: Tensor) -> None:
        pass

    def to_public_adapter(self, tensors: Mapping[str, Tensor], base: str) -> PublicAdapter:
        raise RuntimeError("adapter.kind none has nothing to save")


def assemble_adapter(config: RunConfig, skeleton: Skeleton) -> Adapter:
    """Return the adapter of ``config`` for the model ``skeleton``, which it is not attached to.

    It computes in ``base.compute_dtype``, or with ``train.precision: fp32`` in float32.

    Raises:
        UserError: settings that exclude each other.
    """
    compute = parse_torch_dtype(config.base.compute_dtype)
    arithmetic = compute if config.train.precision == "bf16" else torch.float32
    seed = config.train.seed
    adapter = make_adapter(config.adapter, seed=seed, arithmetic=arithmetic)
    if isinstance(config.adapter, LoraConfig) and config.adapter.train_router:
        if skeleton.head is not None:
            raise UserError("adapter.train_router is for base.head: lm; leave it out")
        return RouterAdapter(adapter, config.adapter.router_aux_loss)
    if skeleton.head is None:
        return adapter
    return add_classifier_head(
        adapter,
        skeleton.head,
        seed=seed,
        arithmetic=arithmetic,
        discriminator=choose_discriminator_size(config),
    )


def assemble_joined(points: Sequence[RunConfig], skeleton: Skeleton) -> JoinedAdapter:
    """Return the adapters of the points of a sweep for the model ``skeleton``, not attached.

    Raises:
        UserError: settings that exclude each other.
    """
    if any(getattr(point.adapter, "train_router", False) for point in points):
        raise UserError("sweep: adapter.train_router is not for sweeps; leave it out")
    return JoinedAdapter([cast(Any, assemble_adapter(point, skeleton)) for point in points])


def make_adapter(config: AdapterConfig, *, seed: int, arithmetic: torch.dtype) -> Adapter:
    """The method that ``config.kind`` names.

    Args:
        config: the ``adapter`` section.
        seed: ``train.seed``: start values and dropout.
        arithmetic: type in which adapters compute; their parameters are always float32, and so is
            the arithmetic of IA3 and of those with virtual tokens.
    """
    if isinstance(config, LinearsConfig):
        method = _ON_LINEARS[type(config)]
        return method(config, seed=seed, arithmetic=arithmetic)
    if isinstance(config, Ia3Config):
        return Ia3Adapter(config)
    if isinstance(config, PromptConfig):
        return PromptTuningAdapter(config, seed=seed)
    if isinstance(config, PTuningConfig):
        return PTuningAdapter(config, seed=seed)
    if isinstance(config, PrefixConfig):
        return PrefixAdapter(config, seed=seed)
    if isinstance(config, BottleneckConfig):
        return BottleneckAdapter(
            config, seed=seed, arithmetic=arithmetic, read_adapter=read_adapter_directory
        )
    if isinstance(config, FusionConfig):
        return FusionAdapter(
            config, seed=seed, arithmetic=arithmetic, read_adapter=read_adapter_directory
        )
    if isinstance(config, FullConfig | PartialConfig):
        return PartialAdapter(config, arithmetic=arithmetic, seed=seed)
    return NoAdapter()
