"""The plan of a run: memory of the fullest rank, traffic, host memory and time."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from dist_peft.core.config.run import RunConfig
from dist_peft.core.config.sweep_points import count_joined
from dist_peft.core.errors import UserError
from dist_peft.engine import resolve_engine_kind
from dist_peft.model.block_kinds import block_kind
from dist_peft.model.document_attention import DOCUMENT_ATTENTION
from dist_peft.model.frozen_linear import FrozenWeight
from dist_peft.model.parameter_readers import list_unread_parameters
from dist_peft.plan.cluster import Cluster, FixedShares
from dist_peft.plan.duration import Duration, plan_duration
from dist_peft.plan.host import HostPeaks, plan_host_peaks
from dist_peft.plan.memory import MemoryPlan, build_memory_plan, extrapolate_phases
from dist_peft.plan.planned_model import PlannedModel
from dist_peft.plan.resting import (
    RestingBytes,
    count_own_rows,
    count_resting_bytes,
    count_shard_ranks,
)
from dist_peft.plan.step_trace import trace_step
from dist_peft.plan.traffic import (
    Traffic,
    count_kept_traced,
    count_rank_micro_batches,
    plan_traffic,
)

__all__ = ["TRACED_BLOCKS", "RunPlan", "choose_traced_blocks", "plan_run"]

TRACED_BLOCKS = 2


@dataclass(frozen=True)
class RunPlan:
    """What a run needs.

    Attributes:
        source: files that the shapes are of.
        engine: kind of the engine.
        resting: of the fullest rank.
        stored: bytes of all parameters that are loaded, as stored.
        own_rows: bytes of rows, rank by rank (of one shard group); with ``single`` one number.
        attention: implementation of attention, and whether packed rows get a mask.
        gathered_block: bytes of a block of the traced kind while it is gathered.
        first_share: share of the steps that this is true of, the first ones; the others take less.
    """

    source: str
    engine: str
    memory: MemoryPlan
    resting: RestingBytes
    stored: int
    own_rows: tuple[int, ...]
    traffic: Traffic
    host: HostPeaks
    duration: Duration | None
    attention: str
    gathered_block: int = 0
    first_share: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values, totals included."""
        memory = asdict(self.memory) | {
            "total": self.memory.total,
            "allocated": self.memory.allocated,
            "spare": self.memory.spare,
            "fits": self.memory.fits,
        }
        times = None
        if self.duration is not None:
            times = asdict(self.duration) | {
                "seconds": self.duration.seconds,
                "limited_by": self.duration.limited_by,
                "projection": True,
            }
        return {
            "source": self.source,
            "engine": self.engine,
            "attention": self.attention,
            "memory": memory,
            "resting": asdict(self.resting),
            "stored": self.stored,
            "own_rows": list(self.own_rows),
            "gathered_block": self.gathered_block,
            "first_share": self.first_share,
            "traffic": asdict(self.traffic),
            "host": asdict(self.host),
            "time": times,
        }


def plan_run(
    planned: PlannedModel,
    cluster: Cluster,
    *,
    device_type: str = "cuda",
    shares: FixedShares | None = None,
) -> RunPlan:
    """Plan the run of ``planned.config`` on ``cluster``.

    Args:
        device_type: device whose kernels are planned for.
        shares: assumed memory outside of tensors.

    Raises:
        UserError: the configuration does not fit the ranks.
    """
    config, skeleton = planned.config, planned.skeleton
    world = cluster.make_world(config.engine)
    kind = resolve_engine_kind(config.engine, world)
    _check_global_batch(config, cluster)
    model, blocks = skeleton.model, skeleton.blocks
    resting = count_resting_bytes(model, blocks, config, world)
    indices = choose_traced_blocks(blocks)
    traced = count_resting_bytes(model, [blocks[i] for i in indices], config, world)
    kept = min(config.engine.keep_gathered, len(blocks))
    kept_traced = count_kept_traced(kept, len(blocks), len(indices))
    engine = config.engine.model_copy(update={"keep_gathered": kept_traced})
    trace = trace_step(
        skeleton,
        planned.adapter,
        config.model_copy(update={"engine": engine}),
        world,
        blocks=indices,
        device_type=device_type,
        micro_batches=min(2, count_rank_micro_batches(config, cluster)),
    )
    phases = extrapolate_phases(
        trace,
        traced,
        len(blocks),
        (traced.trainable, resting.trainable),
        frees_kept=kind == "fsdp2",
        kept_blocks=(kept - kept_traced) if cluster.ranks > 1 else 0,
    )
    memory = build_memory_plan(resting, phases, cluster, shares or FixedShares())
    shards = count_shard_ranks(config, world)
    traffic = plan_traffic(trace, len(blocks), resting.trainable, config, cluster, resting.fetched)
    tokens = config.train.micro_batch * config.data.seq_len * count_joined(config)
    weights = _count_packed_weights(blocks)
    offloaded = trace.host_bytes * len(blocks)
    host = plan_host_peaks(
        skeleton,
        resting,
        shards if config.engine.shard_base else 1,
        offloaded,
        solves=config.base.quant is not None and config.base.quant.solver == "gptq",
    )
    duration = plan_duration(
        *(trace, len(blocks), weights, tokens, traffic, cluster),
        kept_weights=host.kept_weights,
        kept_bytes=host.kept_rows,
        offloaded=offloaded,
        decodes_again=config.engine.activation_checkpointing
        and config.engine.keep_results != "products"
        and not config.engine.share_decodes,
    )
    return RunPlan(
        planned.source,
        kind,
        memory,
        resting,
        _count_stored_bytes(model),
        count_own_rows(model, blocks, config, world),
        traffic,
        host,
        duration,
        _describe_attention(config, skeleton.model_config._attn_implementation),
        trace.gathered_block,
        planned.first_share,
    )


def choose_traced_blocks(blocks: Sequence[nn.Module]) -> list[int]:
    """Return the indices of up to two neighbouring blocks of the largest kind."""
    sizes = Counter[object]()
    kinds = [block_kind(block) for block in blocks]
    for kind, block in zip(kinds, blocks, strict=True):
        sizes[kind] = sum(p.numel() * p.element_size() for p in block.parameters())
    largest = max(sizes.values())
    found = [i for i, kind in enumerate(kinds) if sizes[kind] == largest]
    if len(found) >= TRACED_BLOCKS:
        return found[:TRACED_BLOCKS]
    others = [i for i in range(len(blocks)) if i not in found]
    return sorted([*found, *others[: TRACED_BLOCKS - len(found)]])


def _count_stored_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters that are loaded."""
    unread = list_unread_parameters(model)
    loaded = (p for p in model.parameters() if id(p) not in unread)
    return sum(p.numel() * p.element_size() for p in loaded)


def _check_global_batch(config: RunConfig, cluster: Cluster) -> None:
    if config.train.global_batch < cluster.ranks:
        raise UserError(
            f"train.global_batch is {config.train.global_batch} sequences for {cluster.ranks} "
            "ranks; every rank needs one: raise it, or plan fewer ranks"
        )


def _count_packed_weights(blocks: Sequence[nn.Module]) -> int:
    return sum(
        module.in_features * module.packed.shape[0]
        for block in blocks
        for module in block.modules()
        if isinstance(module, FrozenWeight)
    )


def _describe_attention(config: RunConfig, implementation: str) -> str:
    if implementation == DOCUMENT_ATTENTION:
        return "sdpa, document by document, without a mask"
    length = config.data.seq_len
    return f"{implementation}, with a mask [{length}, {length}] of packed or padded rows"
