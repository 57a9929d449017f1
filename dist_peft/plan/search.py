"""Plans of changed runs: larger micro-batches, other shard groups, blocks kept gathered, gathers of
routed experts or of none, fewer cards, bits, offload, results kept from recomputation, shared
decodes.

Every proposal is planned in full (a few seconds each); only options that exist are tried, one at a
time, micro-batches in steps of two as long as they fit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_peft.core.config.run import EngineConfig, QuantConfig, RunConfig
from dist_peft.core.errors import UserError
from dist_peft.model.experts import FrozenExperts
from dist_peft.plan.cluster import Cluster, FixedShares
from dist_peft.plan.planned_model import PlannedModel, build_planned_model
from dist_peft.plan.run_plan import RunPlan, plan_run

__all__ = ["Proposal", "format_proposals", "search_plans"]

_SPARE = 2 * 2**30
"""Bytes that stay free of a card whose memory is given to kept blocks."""

_WORTHWHILE = 0.9
"""Share of the bytes gathered with all experts, or of a card's memory, up to which another way of
the experts is proposed."""


@dataclass(frozen=True)
class Proposal:
    """A changed run and its plan.

    Attributes:
        change: as overrides of the command line, or the number of cards.
        needed, spare: bytes of a card.
        tokens_per_second: projected, of all ranks; None without ``--gpu``.
    """

    change: str
    ranks: int
    needed: int
    spare: int
    tokens_per_second: float | None

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def search_plans(
    planned: PlannedModel, cluster: Cluster, base_config: Path | None = None
) -> Iterator[Proposal]:
    """Yield proposals in the order in which they are planned.

    Args:
        base_config: as of ``build_planned_model``, for other bits.
    """
    config = planned.config
    per_rank = config.train.global_batch // cluster.ranks
    size = config.train.micro_batch
    while size * 2 <= per_rank:
        size *= 2
        found = _propose(planned, cluster, f"train.micro_batch={size}", {"micro_batch": size})
        yield from found
        if not found or found[0].spare < 0:
            break
    if config.train.micro_batch > 1:
        yield from _propose(planned, cluster, "train.micro_batch=1", {"micro_batch": 1})
    for group in ("all", "node"):
        if cluster.nodes > 1 and config.engine.shard_group != group:
            yield from _propose_engine(planned, cluster, "shard_group", group)
    if cluster.ranks > 1:
        yield from _propose_kept_blocks(planned, cluster)
        yield from _propose_ways_of_experts(planned, cluster)
    offloads = config.engine.cpu_offload == "none" and config.engine.gather_experts != "tokens"
    if cluster.ranks > 1 and config.engine.kind != "zero" and offloads:
        yield from _propose_engine(planned, cluster, "cpu_offload", "params")
    for key, value in _list_recomputation_changes(config.engine):
        yield from _propose_engine(planned, cluster, key, value)
    if cluster.gpus_per_node > 1 and cluster.gpus_per_node % 2 == 0:
        fewer = replace(cluster, gpus_per_node=cluster.gpus_per_node // 2)
        yield from _propose(planned, fewer, f"--gpus-per-node {fewer.gpus_per_node}", {})
    if planned.skeleton.prequantized is None:
        for bits in (4, 3, 2):
            yield from _propose_bits(planned, cluster, bits, base_config)


def _list_recomputation_changes(engine: EngineConfig) -> Iterator[tuple[str, str | bool]]:
    if not engine.activation_checkpointing:
        return
    for kept in ("attention", "products"):
        if engine.keep_results != kept and (kept != "products" or not engine.share_decodes):
            yield "keep_results", kept
    if not engine.share_decodes and engine.keep_results != "products":
        yield "share_decodes", True
    if not engine.offload_inputs:
        yield "offload_inputs", True


def _propose(
    planned: PlannedModel, cluster: Cluster, change: str, train: dict[str, Any]
) -> list[Proposal]:
    update = {"train": planned.config.train.model_copy(update=train)}
    changed = replace(planned, config=planned.config.model_copy(update=update))
    try:
        plan = plan_run(changed, cluster)
    except UserError:
        return []  # these ranks do not fit the run at all
    return [_to_proposal(plan, change, cluster)]


def _propose_engine(
    planned: PlannedModel, cluster: Cluster, key: str, value: str | int
) -> list[Proposal]:
    engine = planned.config.engine.model_copy(update={key: value})
    changed = replace(planned, config=planned.config.model_copy(update={"engine": engine}))
    return _propose(changed, cluster, f"engine.{key}={value}".lower(), {})


def _propose_kept_blocks(planned: PlannedModel, cluster: Cluster) -> list[Proposal]:
    """Propose to keep as many blocks gathered as leave 2 GiB of a card."""
    kept = planned.config.engine.keep_gathered
    if planned.config.engine.gather_experts != "all":
        return []  # which exclude it
    try:
        plan = plan_run(planned, cluster)
    except UserError:
        return []
    if not plan.gathered_block:
        return []
    more = int(
        (plan.memory.spare - _SPARE) / (plan.gathered_block * (1 + FixedShares().fragmentation))
    )
    count = min(len(planned.skeleton.blocks), kept + more)
    return [] if count <= kept else _propose_engine(planned, cluster, "keep_gathered", count)


def _propose_ways_of_experts(planned: PlannedModel, cluster: Cluster) -> list[Proposal]:
    """Propose to gather the experts that tokens are routed to where that saves a tenth or more of
    the bytes, and to send tokens to their experts where that saves as much, or memory."""
    engine = planned.config.engine
    is_mixture = any(isinstance(m, FrozenExperts) for m in planned.skeleton.model.modules())
    if not is_mixture or engine.gather_experts != "all" or engine.keep_gathered:
        return []
    try:
        before = plan_run(planned, cluster)
    except UserError:
        return []
    found = []
    for choice in ("routed", "tokens"):
        if choice == "tokens" and (engine.cpu_offload == "params" or planned.config.train.exact):
            continue  # which it excludes
        update = {"engine": engine.model_copy(update={"gather_experts": choice})}
        changed = replace(planned, config=planned.config.model_copy(update=update))
        after = plan_run(changed, cluster)
        saves = after.traffic.gathered <= _WORTHWHILE * before.traffic.gathered
        saves |= choice == "tokens" and after.memory.total <= _WORTHWHILE * before.memory.total
        if saves:
            found.append(_to_proposal(after, f"engine.gather_experts={choice}", cluster))
    return found


def _propose_bits(
    planned: PlannedModel, cluster: Cluster, bits: int, base_config: Path | None
) -> list[Proposal]:
    quant = planned.config.base.quant
    group = 64 if quant is None else quant.group_size
    values: dict[str, Any] = {"kind": "int", "bits": bits, "group_size": group, "solver": "hqq"}
    wanted = QuantConfig(**values)
    if quant is not None and (quant.kind, quant.bits) == ("int", bits):
        return []
    config: RunConfig = planned.config.model_copy(
        update={"base": planned.config.base.model_copy(update={"quant": wanted})}
    )
    changed = build_planned_model(config, base_config)
    return _propose(changed, cluster, f"base.quant={{kind: int, bits: {bits}, solver: hqq}}", {})


def _to_proposal(plan: RunPlan, change: str, cluster: Cluster) -> Proposal:
    rate = None if plan.duration is None else plan.duration.tokens_per_second
    return Proposal(change, cluster.ranks, plan.memory.total, plan.memory.spare, rate)


def format_proposals(proposals: Sequence[Proposal]) -> list[str]:
    """Return a table: those that fit first, fastest or roomiest first."""
    lines = ["", "Changes, one at a time"]
    ordered = sorted(proposals, key=lambda p: (p.spare < 0, -(p.tokens_per_second or 0), -p.spare))
    for proposal in ordered:
        rate = proposal.tokens_per_second
        lines.append(
            f"  {proposal.change:<46}{proposal.needed / 2**30:8.2f} GiB, "
            + (f"left {proposal.spare / 2**30:.2f}" if proposal.spare >= 0 else "does not fit")
            + ("" if rate is None else f", {rate:,.0f} tokens/s")
        )
    return lines
