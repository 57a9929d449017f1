"""Warn once about options that are set but have no effect in this run.

Options that contradict the run are refused elsewhere; these are merely unused, such as options of
another engine or a micro-batch larger than the rank's share of the batch.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from torch import nn

from dist_peft.core.config.run import FullConfig, LoraConfig, PartialConfig, RunConfig
from dist_peft.core.log import ONCE
from dist_peft.core.world import World
from dist_peft.engine import resolve_engine_kind
from dist_peft.model.frozen_linear import FrozenWeight
from dist_peft.quant.codec import find_unused_quant_keys, list_quant_keys

__all__ = ["find_unused_options", "warn_unused_options"]

log = logging.getLogger("dist_peft")

_NO_PEERS = (
    "shard_base",
    "shard_group",
    "keep_gathered",
    "gather_experts",
    "reduce_gradients",
    "cpu_offload",
)
_DEEPSPEED = ("stage", "deepspeed_config")
_IGNORED = {"single": (*_NO_PEERS, *_DEEPSPEED), "fsdp2": _DEEPSPEED, "zero": ("reduce_gradients",)}
"""Engine -> options of section ``engine`` that it ignores."""
_INIT_OPTIONS = {
    "init_iterations": ("pissa", "loftq", "lora_ga"),
    "init_samples": ("eva", "lora_ga"),
    "init_rho": ("eva",),
    "init_gamma": ("lora_ga",),
}
"""Option of LoRA -> values of ``adapter.init`` that use it."""


def warn_unused_options(config: RunConfig, world: World, model: nn.Module, device: str) -> None:
    """Log a warning for each option without effect.

    Args:
        model: model with its frozen linears; may be on meta.
        device: type of the compute device.

    Raises:
        UserError: the engine does not support the number of processes.
    """
    kind = resolve_engine_kind(config.engine, world)
    for text in find_unused_options(config, kind, _find_widest_input(model), device):
        log.warning("%s", text, extra=ONCE)


def find_unused_options(config: RunConfig, engine: str, widest: int, device: str) -> Iterator[str]:
    """Yield a sentence for each option without effect, in the order of the sections.

    Args:
        engine: the engine of the run, resolved.
        widest: the largest in_features of a quantized linear; 0 without any.
        device: ``cpu`` or ``cuda``.
    """
    yield from _find_unused_base_options(config, widest)
    yield from _find_unused_unfreezing_options(config)
    yield from _find_unused_adapter_options(config)
    yield from _find_unused_engine_options(config, engine, device)
    yield from _find_unused_train_options(config)


def _find_unused_base_options(config: RunConfig, widest: int) -> Iterator[str]:
    base = config.base
    if base.revision is not None and Path(base.path).expanduser().is_dir():
        yield (
            f"base.revision {base.revision} has no effect: base.path {base.path} is a directory, "
            "and revisions are the hub's"
        )
    if base.quant is None:
        return
    if widest == 0 and isinstance(config.adapter, FullConfig | PartialConfig):
        if "quant" in base.model_fields_set:
            yield (
                f"base.quant has no effect: adapter.kind {config.adapter.kind} trains every linear "
                "of the blocks, unquantized; set it to null"
            )
        return
    for name, kinds in find_unused_quant_keys(base.quant.kind):
        if not _is_default_value(base.quant, name):
            yield f"base.quant.{name} has no effect: it is for kind {kinds}"
    for name in ("calibration_samples", "calibration_tokens"):
        if base.quant.solver != "gptq" and not _is_default_value(base.quant, name):
            yield f"base.quant.{name} has no effect: it is for solver gptq"
    in_groups = "group_size" in list_quant_keys(base.quant.kind)
    if in_groups and 0 < widest < base.quant.group_size:
        yield (
            f"base.quant.group_size {base.quant.group_size} is more than the largest in_features, "
            f"{widest}: each row is one group, padded with zeros to {base.quant.group_size} "
            f"weights; set it to at most {widest}"
        )


def _find_unused_adapter_options(config: RunConfig) -> Iterator[str]:
    adapter = config.adapter
    if not isinstance(adapter, LoraConfig):
        return
    if adapter.router_aux_loss is not None and not adapter.train_router:
        yield (
            f"adapter.router_aux_loss {adapter.router_aux_loss} has no effect: "
            "adapter.train_router is false"
        )
    for name, users in _INIT_OPTIONS.items():
        if adapter.init not in users and not _is_default_value(adapter, name):
            yield (
                f"adapter.{name} {getattr(adapter, name)} has no effect with adapter.init "
                f"{adapter.init}: it is for {' and '.join(users)}"
            )


def _find_unused_unfreezing_options(config: RunConfig) -> Iterator[str]:
    adapter, steps = config.adapter, config.train.steps
    if isinstance(adapter, PartialConfig) and steps is not None:
        for stage in adapter.unfreeze:
            if stage.step >= steps:
                yield (
                    f"adapter.unfreeze has a stage at step {stage.step}, which has no effect: the "
                    f"run ends after step {steps}"
                )


def _find_unused_engine_options(config: RunConfig, engine: str, device: str) -> Iterator[str]:
    section = config.engine
    for name in _IGNORED[engine]:
        if not _is_default_value(section, name):
            yield (
                f"engine.{name} {getattr(section, name)} has no effect: this run's engine is "
                f"{engine}"
            )
    if section.keep_results != "none" and not section.activation_checkpointing:
        yield (
            f"engine.keep_results {section.keep_results} has no effect: "
            "engine.activation_checkpointing is false, so that everything is kept"
        )
    gathers_all = section.gather_experts == "all"
    if not gathers_all and engine != "single" and not section.shard_base:
        yield (
            f"engine.gather_experts {section.gather_experts} has no effect: engine.shard_base is "
            "false"
        )
    if section.offload_inputs and (device == "cpu" or not section.activation_checkpointing):
        reason = (
            "the run computes on the CPU, so everything is in host memory"
            if device == "cpu"
            else "engine.activation_checkpointing is false"
        )
        yield f"engine.offload_inputs has no effect: {reason}"
    if engine == "single":
        return
    if section.cpu_offload != "none" and device == "cpu":
        yield (
            f"engine.cpu_offload {section.cpu_offload} has no effect: the run computes on the CPU, "
            "so everything is in host memory"
        )
    if (
        engine == "zero"
        and not section.shard_base
        and not _is_default_value(section, "shard_group")
    ):
        yield (
            f"engine.shard_group {section.shard_group} has no effect: engine.shard_base is false, "
            "and DeepSpeed shards adapters over all ranks"
        )


def _find_unused_train_options(config: RunConfig) -> Iterator[str]:
    train = config.train
    if train.micro_batch > train.global_batch:
        yield (
            f"train.micro_batch {train.micro_batch} has no effect beyond {train.global_batch}, the "
            "sequences of train.global_batch"
        )
    if train.schedule == "constant" and train.min_lr_ratio:
        yield (f"train.min_lr_ratio {train.min_lr_ratio} has no effect: train.schedule is constant")
    if train.eval_every and not config.data.held_out:
        yield f"train.eval_every {train.eval_every} has no effect: data.eval names no source"


def _is_default_value(section: BaseModel, name: str) -> bool:
    return bool(getattr(section, name) == type(section).model_fields[name].default)


def _find_widest_input(model: nn.Module) -> int:
    """Return the largest in_features of frozen weights; a head that is not quantized is none."""
    frozen = [
        m
        for m in model.modules()
        if isinstance(m, FrozenWeight) and not (m.is_head and not m.codec.is_quantized)
    ]
    return max((m.in_features for m in frozen), default=0)
