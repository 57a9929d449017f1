"""Bytes on the wire of an optimizer step, per rank and per link.

Gathered bytes are counted by the engine itself in the traced step. A ring all-gather of ``B`` bytes
over ``n`` ranks brings ``B (n - 1) / n`` to each, as does an all-to-all of rows over even shares
(``engine.gather_experts: tokens``, which counts as gathered); where the ranks of a shard group are
on several nodes, each node must receive what its cards do not hold, ``B (m - 1) / m`` on ``m``
nodes, once, and of the rows that travel to experts what each card has.
"""

from dataclasses import dataclass

from dist_peft.core.config.run import RunConfig
from dist_peft.core.world import World
from dist_peft.data.loader import count_micro_batches
from dist_peft.engine import resolve_engine_kind
from dist_peft.plan.cluster import Cluster
from dist_peft.plan.resting import count_shard_ranks
from dist_peft.plan.step_trace import StepTrace

__all__ = ["Traffic", "count_kept_traced", "count_rank_micro_batches", "plan_traffic"]


@dataclass(frozen=True)
class Traffic:
    """Bytes of one optimizer step.

    Attributes:
        gathered: all-gather output of a rank (padding included), in one micro-batch: the mean over
            those of a step; the first alone gathers the blocks that ``engine.keep_gathered`` keeps.
        card_bytes: received by a card from its neighbours and the network, in a step.
        node_bytes: received by a node from other nodes, in a step.
        reduced: gradients that a rank sends to be summed, in a step.
        micro_batches: of a step.
    """

    gathered: int
    card_bytes: int
    node_bytes: int
    reduced: int
    micro_batches: int


def plan_traffic(
    trace: StepTrace,
    blocks: int,
    trainable: int,
    config: RunConfig,
    cluster: Cluster,
    fetched: int = 0,
) -> Traffic:
    """Return the traffic of a model of ``blocks`` blocks.

    Args:
        trainable: values of the trainable parameters of the whole model.
        fetched: of these, whose gradients travel with the rows (``RestingBytes``).
    """
    micro_batches = count_rank_micro_batches(config, cluster)
    if cluster.ranks == 1:
        return Traffic(0, 0, 0, 0, micro_batches)
    world = cluster.make_world(config.engine)
    first, later = _count_gathered(trace, blocks, config, world)
    per_step = first + later * (micro_batches - 1)
    shards = count_shard_ranks(config, world)
    adapters = 0
    reduces_often = config.engine.reduce_gradients == "micro_batch"
    if resolve_engine_kind(config.engine, world) == "zero":
        reduces_often = config.engine.stage > 1
        # stage 3 gathers adapters for each micro-batch, stages 1 and 2 after an update
        adapters = 4 * trainable
        # DeepSpeed keeps them from forward to backward by the order of modules that it has seen,
        # which two passes in turn break: then they are gathered for every use, recompute too
        uses = 1 if trace.passes == 1 else trace.passes + 2
        per_step += adapters * (micro_batches * uses if config.engine.stage == 3 else 0)
    nodes = max(1, shards // cluster.gpus_per_node)
    replicas = cluster.ranks // shards
    reduced = 4 * (trainable - fetched) * (micro_batches if reduces_often else 1)
    gathered = per_step // micro_batches
    per_step += adapters if config.engine.stage < 3 else 0
    across = per_step * (nodes - 1) // nodes + reduced * (nodes - 1) // nodes
    # rows that travel to experts are each card's own
    exchanged = micro_batches * (trace.exchanged * blocks // len(trace.blocks))
    across += (min(shards, cluster.gpus_per_node) - 1) * exchanged * (nodes - 1) // nodes
    if replicas > 1 and shards <= cluster.gpus_per_node:
        # inside of a node every time, between nodes once a step
        across += 2 * 4 * trainable * (cluster.nodes - 1) // cluster.nodes
    received = (per_step + reduced) * (shards - 1) // shards
    return Traffic(gathered, received, across, reduced, micro_batches)


def _count_gathered(
    trace: StepTrace, blocks: int, config: RunConfig, world: World
) -> tuple[int, int]:
    """Return the bytes gathered in the first micro-batch of a step and in each later one."""
    traced, block = len(trace.blocks), trace.gathered_block
    kept = min(config.engine.keep_gathered, blocks)
    kept_traced = count_kept_traced(kept, blocks, traced)
    # neither kept nor traced: in each forward pass and in backward
    each = (trace.passes + 1) * block
    if config.engine.activation_checkpointing:  # tokens travel in recomputation too
        each += trace.exchanged // traced // (trace.passes + 2)
    others = each * (blocks - traced - (kept - kept_traced))
    later = sum(trace.gathered.values()) + others
    if not trace.gathered_first:
        first = later + block * (kept - kept_traced)
    else:
        # adapters that are gathered before the first forward of a run stay whole
        in_step = sum(n for phase, n in trace.gathered_first.items() if phase != "start")
        first = in_step + others + block * (kept - kept_traced)
    if resolve_engine_kind(config.engine, world) == "zero":
        first -= block * kept  # frozen rows are kept over steps too
    return first, later


def count_kept_traced(kept: int, blocks: int, traced: int) -> int:
    """Return how many of the traced blocks, which stand for the last ones, are kept gathered."""
    return max(0, kept - (blocks - traced))


def count_rank_micro_batches(config: RunConfig, cluster: Cluster) -> int:
    """Return the micro-batches that a rank computes in a step."""
    whole = count_micro_batches(config.train.global_batch, config.train.micro_batch)
    return -(-whole // cluster.ranks)
