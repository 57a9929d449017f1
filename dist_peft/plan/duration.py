"""A projection of the time of an optimizer step: products, memory and links at given rates.

Nothing here is measured. Floating point operations are counted in the traced step; the time of a
micro-batch is that of the slower of computing and receiving, as gathers overlap with computing.
Through the quantizer, rows are encoded again between steps, when nothing else runs.
"""

from dataclasses import dataclass, replace

from dist_peft.plan.cluster import Cluster
from dist_peft.plan.step_trace import StepTrace
from dist_peft.plan.traffic import Traffic

__all__ = ["EFFICIENCY", "Duration", "plan_duration"]

EFFICIENCY = 0.45
"""Share of a card's peak that products of this size reach; an assumption."""

LINK_EFFICIENCY = 0.8
"""Share of a link's rate that collectives reach; an assumption."""

_BYTES_PER_WEIGHT = 3.0
"""A weight is dequantized in each forward pass, in recomputation (unless its products are kept or
the decode is shared) and backward; bytes moved for
each: packed, written and read again. An assumption."""

_HOST_LINK = 25e9
"""Bytes a second from host memory to a card: PCIe 4; an assumption."""

_ENCODE_BYTES = 60.0
"""Bytes of device memory moved for each weight that is encoded again: a product of small rank and
about fifteen elementwise operations in float32. An assumption."""


@dataclass(frozen=True)
class Duration:
    """Seconds of an optimizer step, projected.

    Attributes:
        products: floating point operations at ``EFFICIENCY`` of the peak.
        dequantizing: memory traffic of dequantized weights.
        neighbours, network: receiving at ``LINK_EFFICIENCY`` of the links.
        tokens_per_second: positions of all ranks.
        encoding: a rank's own rows, once a step (``adapter.through_quantizer``).
        offloading: blocks' inputs to host memory and back (``engine.offload_inputs``).
    """

    flops: float
    products: float
    dequantizing: float
    neighbours: float
    network: float
    tokens_per_second: float
    encoding: float = 0.0
    offloading: float = 0.0

    @property
    def computing(self) -> float:
        return self.products + self.dequantizing

    @property
    def seconds(self) -> float:
        others = (self.neighbours, self.network, self.offloading)
        return max(self.computing, *others) + self.encoding

    @property
    def limited_by(self) -> str:
        """The slowest of computing, neighbours (NVLink, PCIe), network and host memory's link."""
        times = {
            "computing": self.computing,
            "the cards' links": self.neighbours,
            "the network": self.network,
            "the link to host memory": self.offloading,
        }
        return max(times, key=lambda name: times[name])


def plan_duration(
    trace: StepTrace,
    blocks: int,
    weights: int,
    tokens: int,
    traffic: Traffic,
    cluster: Cluster,
    kept_weights: int = 0,
    kept_bytes: int = 0,
    offloaded: int = 0,
    decodes_again: bool = True,
) -> Duration | None:
    """Return the projection; None without ``cluster.gpu``.

    Args:
        weights: packed weights (numbers) of all blocks.
        tokens: positions of a micro-batch of one rank.
        kept_weights, kept_bytes: of a rank's rows that are encoded again in each step.
        offloaded: bytes of blocks' inputs that a micro-batch sends to host memory.
        decodes_again: recomputation and backward decode a frozen weight each.
    """
    gpu = cluster.gpu
    if gpu is None:
        return None
    flops = float(sum(trace.flops.values()) + (blocks - len(trace.blocks)) * trace.block_flops)
    count = traffic.micro_batches
    products = count * flops / (gpu.flops * EFFICIENCY)
    decodes = trace.passes + 1 + decodes_again
    dequantizing = count * decodes * _BYTES_PER_WEIGHT * weights / gpu.memory
    neighbours = traffic.card_bytes / (gpu.neighbours * LINK_EFFICIENCY)
    network = 0.0 if cluster.link is None else traffic.node_bytes / (cluster.link * LINK_EFFICIENCY)
    encoding = kept_bytes / _HOST_LINK + kept_weights * _ENCODE_BYTES / gpu.memory
    offloading = count * 2 * offloaded / _HOST_LINK
    duration = Duration(
        flops * count, products, dequantizing, neighbours, network, 0.0, encoding, offloading
    )
    rate = tokens * count * cluster.ranks / duration.seconds
    return replace(duration, tokens_per_second=rate)
