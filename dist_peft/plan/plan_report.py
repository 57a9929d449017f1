"""A plan as text."""

from collections.abc import Iterator

from dist_peft.core.config.run import RunConfig
from dist_peft.plan.advice import list_changes
from dist_peft.plan.cluster import Cluster
from dist_peft.plan.run_plan import RunPlan

__all__ = ["format_byte_count", "format_plan"]

_HEADINGS = {
    "rest": "at rest (exact)",
    "step": "at the peak of a step (traced)",
    "assumed": "outside of tensors (assumed)",
}


def format_byte_count(size: float) -> str:
    """Return bytes as GiB, MiB or KiB."""
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if abs(size) >= 0.095 * 2**30 or (unit == "MiB" and abs(size) >= 2**20):
            return f"{size / 2**power:.2f} {unit}"
    return f"{size / 2**10:.1f} KiB"


def format_plan(plan: RunPlan, config: RunConfig, cluster: Cluster) -> list[str]:
    """Return the lines that ``dist-peft plan`` prints."""
    memory = plan.memory
    lines = [
        f"{config.base.path} on {cluster.nodes} x {cluster.gpus_per_node} cards of "
        f"{format_byte_count(cluster.gpu_memory)}, engine {plan.engine}, shapes of {plan.source}",
        f"attention: {plan.attention}",
        *_format_share(plan),
        "",
        "Memory of the fullest rank",
    ]
    for kind, heading in _HEADINGS.items():
        items = [item for item in memory.items if item.kind == kind]
        total = sum(item.bytes for item in items)
        title = heading + (f", {memory.peak_phase}" if kind == "step" else "")
        lines.append(f"  {title:<42}{format_byte_count(total):>12}")
        lines += [f"    {item.name:<40}{format_byte_count(item.bytes):>12}" for item in items]
    lines += [
        f"  {'needed':<42}{format_byte_count(memory.total):>12}",
        f"  {'left on the card' if memory.fits else 'MISSING':<42}"
        f"{format_byte_count(abs(memory.spare)):>12}",
        "  beyond rest, by phase: "
        + ", ".join(f"{p.phase} {format_byte_count(p.total)}" for p in memory.phases),
        "",
        *_format_traffic(plan, cluster),
        *_format_host(plan),
        *_format_duration(plan),
        *list_changes(plan, config, cluster),
    ]
    return lines


def _format_share(plan: RunPlan) -> Iterator[str]:
    if plan.first_share < 1:
        yield (
            f"the first {plan.first_share:.0%} of the steps (adapter.through_start): the others "
            "take no more memory"
        )


def _format_traffic(plan: RunPlan, cluster: Cluster) -> Iterator[str]:
    traffic = plan.traffic
    if cluster.ranks == 1:
        return
    yield "Traffic of an optimizer step"
    yield (
        f"  {traffic.micro_batches} micro-batches a rank, each gathers "
        f"{format_byte_count(traffic.gathered)}; gradients {format_byte_count(traffic.reduced)}"
    )
    yield f"  received by a card                        {format_byte_count(traffic.card_bytes):>12}"
    yield f"  received by a node over the network       {format_byte_count(traffic.node_bytes):>12}"
    yield ""


def _format_host(plan: RunPlan) -> Iterator[str]:
    host = plan.host
    yield "Host memory, without the processes' imports"
    yield f"  load, a rank                              {format_byte_count(host.load):>12}"
    if host.rest:
        yield f"  training, a rank                          {format_byte_count(host.rest):>12}"
    if host.kept_rows:
        yield f"    rows to encode again (through_quantizer){format_byte_count(host.kept_rows):>14}"
    if host.factor:
        yield f"    GPTQ's largest factor (solver gptq)     {format_byte_count(host.factor):>14}"
        files = format_byte_count(host.factor_files)
        yield f"    on disk, all factors, at most           {files:>14}"
    if host.block_inputs:
        yield f"    blocks' inputs (offload_inputs) {format_byte_count(host.block_inputs):>22}"
    yield f"  merge                                     {format_byte_count(host.merge):>12}"
    yield f"  verification of a merge, loaded whole     {format_byte_count(host.verify):>12}"
    yield f"    or block by block (--verify blocks)     {format_byte_count(host.verify_blocks):>12}"
    yield ""


def _format_duration(plan: RunPlan) -> Iterator[str]:
    time = plan.duration
    if time is None:
        return
    yield "Time of an optimizer step (projection, not measured)"
    yield (
        f"  {time.seconds:.2f} s, {time.tokens_per_second:,.0f} tokens/s of all ranks, limited by "
        f"{time.limited_by}"
    )
    yield (
        f"  products {time.products:.2f} s ({time.flops / 1e15:.2f} PFLOP a rank), dequantizing "
        f"{time.dequantizing:.2f} s, cards' links {time.neighbours:.2f} s, network "
        f"{time.network:.2f} s"
    )
    if time.offloading:
        yield f"  blocks' inputs to host memory and back, at the same time: {time.offloading:.2f} s"
    if time.encoding:
        yield f"  encoding a rank's own rows again, once a step: {time.encoding:.2f} s"
    yield ""
