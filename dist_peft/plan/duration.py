"""A projection of the time of an optimizer step: products, memory and links at given rates.

Nothing here is measured. Floating point operations are counted in the traced step; the time of a
micro-batch is that of the slower of computing and receiving, as gathers overlap with computing.
"""

from dataclasses import dataclass

from dist_peft.plan.cluster import Cluster
from dist_peft.plan.step_trace import StepTrace
from dist_peft.plan.traffic import Traffic

__all__ = ["EFFICIENCY", "Duration", "plan_duration"]

EFFICIENCY = 0.45
"""Share of a card's peak that products of this size reach; an assumption."""

LINK_EFFICIENCY = 0.8
"""Share of a link's rate that collectives reach; an assumption."""

_DECODES, _BYTES_PER_WEIGHT = 2, 3.0
"""A weight is dequantized in each forward pass, in recompute and backward; bytes moved for each:
packed, written and read again. An assumption."""


@dataclass(frozen=True)
class Duration:
    """Seconds of an optimizer step, projected.

    Attributes:
        products: floating point operations at ``EFFICIENCY`` of the peak.
        dequantizing: memory traffic of dequantized weights.
        neighbours, network: receiving at ``LINK_EFFICIENCY`` of the links.
        tokens_per_second: positions of all ranks.
    """

    flops: float
    products: float
    dequantizing: float
    neighbours: float
    network: float
    tokens_per_second: float

    @property
    def computing(self) -> float:
        return self.products + self.dequantizing

    @property
    def seconds(self) -> float:
        return max(self.computing, self.neighbours, self.network)

    @property
    def limited_by(self) -> str:
        """The slowest of computing, neighbours (NVLink, PCIe) and network."""
        times = {
            "computing": self.computing,
            "the cards' links": self.neighbours,
            "the network": self.network,
        }
        return max(times, key=lambda name: times[name])


def plan_duration(
    trace: StepTrace,
    blocks: int,
    weights: int,
    tokens: int,
    traffic: Traffic,
    cluster: Cluster,
) -> Duration | None:
    """Return the projection; None without ``cluster.gpu``.

    Args:
        weights: packed weights (numbers) of all blocks.
        tokens: positions of a micro-batch of one rank.
    """
    gpu = cluster.gpu
    if gpu is None:
        return None
    flops = float(sum(trace.flops.values()) + (blocks - len(trace.blocks)) * trace.block_flops)
    count = traffic.micro_batches
    products = count * flops / (gpu.flops * EFFICIENCY)
    dequantizing = count * (trace.passes + _DECODES) * _BYTES_PER_WEIGHT * weights / gpu.memory
    neighbours = traffic.card_bytes / (gpu.neighbours * LINK_EFFICIENCY)
    network = 0.0 if cluster.link is None else traffic.node_bytes / (cluster.link * LINK_EFFICIENCY)
    duration = Duration(flops * count, products, dequantizing, neighbours, network, 0.0)
    rate = tokens * count * cluster.ranks / duration.seconds
    return Duration(flops * count, products, dequantizing, neighbours, network, rate)
