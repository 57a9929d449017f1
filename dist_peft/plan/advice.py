"""What limits a planned run, and options that change it."""

from collections.abc import Iterator

from dist_peft.core.config.run import LokrConfig, LowRankConfig, RunConfig
from dist_peft.plan.cluster import Cluster
from dist_peft.plan.run_plan import RunPlan

__all__ = ["list_changes"]

_SPARE = 2 * 2**30
"""Bytes that should be left on a card."""


def list_changes(plan: RunPlan, config: RunConfig, cluster: Cluster) -> list[str]:
    """Return lines on the largest part of the memory and on the options that make it smaller."""
    memory = plan.memory
    largest = max(memory.items, key=lambda item: item.bytes)
    lines = [f"Largest part: {largest.name}, {largest.bytes / 2**30:.2f} GiB"]
    if memory.spare >= _SPARE:
        return lines
    sizes = {item.name: item.bytes for item in memory.items}
    options: list[tuple[int, str]] = []
    tokens = sum(sizes.get(name, 0) for name in ("block inputs", "activations", "logits and loss"))
    if config.train.micro_batch > 1:
        options.append((tokens // 2, f"train.micro_batch={config.train.micro_batch // 2}"))
    if config.data.seq_len > 512:
        options.append((tokens // 2, f"data.seq_len={config.data.seq_len // 2}"))
    options += _list_recomputation_changes(config, sizes, tokens)
    learning = sizes.get("adapter", 0) + sizes.get("optimizer state", 0)
    gradients = sizes.get("gradients", 0)
    adapter = config.adapter
    if isinstance(adapter, LowRankConfig) and not isinstance(adapter, LokrConfig) and adapter.r > 4:
        options.append(((learning + gradients) // 2, f"adapter.r={adapter.r // 2}"))
    if config.train.optimizer == "adamw" and plan.engine != "zero":
        options.append((sizes.get("optimizer state", 0) * 3 // 4, "train.optimizer=adamw8bit"))
    packed = sizes.get("packed base", 0)
    quant = config.base.quant
    if quant is None:
        options.append((packed * 3 // 4, "base.quant={kind: nf4}"))
    elif quant.bits > 3:
        options.append((packed // 5, "base.quant={kind: int, bits: 3, solver: gptq}"))
    if plan.engine == "fsdp2" and config.engine.shard_group != "all":
        options.append((packed // 2, "engine.shard_group=all"))
    if plan.engine == "fsdp2" and config.engine.cpu_offload == "none":
        options.append((packed + learning, "engine.cpu_offload=params (slower)"))
    options.append(((packed + learning) // 2, f"twice as many ranks as {cluster.ranks}"))
    state = "does not fit" if not memory.fits else "leaves less than 2 GiB"
    lines.append(f"It {state}; what would free about so much:")
    for saved, text in sorted(options, reverse=True):
        if saved:
            lines.append(f"  {saved / 2**30:6.2f} GiB  {text}")
    return lines


def _list_recomputation_changes(
    config: RunConfig, sizes: dict[str, int], tokens: int
) -> Iterator[tuple[int, str]]:
    """Yield options of recomputation and what they free; ``tokens``: bytes by tokens."""
    engine = config.engine
    if not engine.activation_checkpointing:
        yield tokens // 2, "engine.activation_checkpointing=true"
        return
    if engine.keep_results != "none":
        yield tokens // 2, "engine.keep_results=none"
    if engine.share_decodes:
        yield sizes.get("dequantized weight", 0), "engine.share_decodes=false"
    if not engine.offload_inputs:
        yield sizes.get("block inputs", 0), "engine.offload_inputs=true (into host memory)"
