"""Advice in one line when memory ran out."""

import torch

from dist_peft.core.config.run import RunConfig
from dist_peft.core.progress_beat import read_beat

__all__ = ["describe_out_of_memory", "remember_memory_options"]

_options = "lower train.micro_batch or data.seq_len"
"""Advice for the configuration of this process."""


def remember_memory_options(config: RunConfig) -> None:
    """Remember which keys of ``config`` can still be lowered."""
    global _options
    _options = _describe_memory_options(config)


def describe_out_of_memory(error: BaseException) -> str | None:
    """Return which memory ran out, where, and advice; None for any other error."""
    text = " ".join(str(error).split())
    on_device = isinstance(error, torch.OutOfMemoryError) or "CUDA out of memory" in text
    on_host = isinstance(error, MemoryError) or "can't allocate memory" in text
    if not (on_device or on_host):
        return None
    kind = "GPU" if on_device else "host"
    size = _find_sizes(text)
    return (
        f"out of {kind} memory {read_beat()[0].describe()}{size}: {_options}, "
        "or use more ranks; dist-peft plan estimates it"
    )


def _find_sizes(text: str) -> str:
    """Return the sizes in torch's message, such as `` (Tried to allocate 2.00 GiB. ...)``."""
    start = text.lower().find("tried to allocate")
    if start < 0:
        return ""
    sentences = text[start:].split(". ")
    known = [s for s in sentences[:2] if "GiB" in s or "MiB" in s or "bytes" in s]
    return f" ({'. '.join(known).rstrip('.')})" if known else ""


def _describe_memory_options(config: RunConfig) -> str:
    train, engine, quant = config.train, config.engine, config.base.quant
    lower = {"data.seq_len": config.data.seq_len}
    if train.micro_batch > 1:
        lower = {"train.micro_batch": train.micro_batch, **lower}
    if (size := getattr(config.adapter, "r", None)) is not None:
        lower["adapter.r"] = size
    settings = []
    if quant is None or quant.bits > 4:
        settings.append("base.quant.kind: nf4")
    if not engine.activation_checkpointing:
        settings.append("engine.activation_checkpointing: true")
    elif engine.keep_results != "none":
        settings.append("engine.keep_results: none")
    if engine.share_decodes:
        settings.append("engine.share_decodes: false")
    if not engine.shard_base:
        settings.append("engine.shard_base: true")
    if engine.shard_group != "all":
        settings.append("engine.shard_group: all")
    if train.optimizer in ("adamw", "paged_adamw"):
        settings.append("train.optimizer: adamw8bit")
    text = f"lower {' or '.join(f'{key} (now {value})' for key, value in lower.items())}"
    return f"{text}, set {' or '.join(settings)}" if settings else text
