"""The machines of a planned run: counts, memory, rates, and the constants that no run computes.

Rates of the built-in cards are peaks from the vendors' data sheets (dense 16-bit tensor products,
memory, one direction of the card's link to its neighbours); ``EFFICIENCY`` is an assumption.
"""

import re
from dataclasses import dataclass

from dist_peft.core.config.run import EngineConfig
from dist_peft.core.errors import UserError
from dist_peft.core.world import World

__all__ = [
    "GPUS",
    "Cluster",
    "FixedShares",
    "GpuRates",
    "parse_byte_count",
    "parse_link_rate",
]

GIB = 2**30


@dataclass(frozen=True)
class GpuRates:
    """Peak rates of a card: FLOP/s in 16 bits, bytes/s of memory and to cards of its node."""

    name: str
    flops: float
    memory: float
    neighbours: float


_PCIE4, _PCIE5 = 25e9, 50e9

GPUS: dict[str, GpuRates] = {
    rates.name.lower(): rates
    for rates in (
        GpuRates("B200", 2250e12, 8.0e12, 900e9),
        GpuRates("H200", 989e12, 4.8e12, 450e9),
        GpuRates("H100", 989e12, 3.35e12, 450e9),
        GpuRates("A100", 312e12, 2.0e12, 300e9),
        GpuRates("L40S", 362e12, 0.864e12, _PCIE4),
        GpuRates("L4", 121e12, 0.3e12, _PCIE4),
        GpuRates("A10G", 70e12, 0.6e12, _PCIE4),
        GpuRates("RTX5090", 210e12, 1.79e12, _PCIE5),
        GpuRates("RTX4090", 165e12, 1.008e12, _PCIE4),
        GpuRates("RTX3090", 71e12, 0.936e12, _PCIE4),
    )
}
"""Lower-case name -> rates, from the data sheets; cards on PCIe with about 80 % of its rate."""


@dataclass(frozen=True)
class FixedShares:
    """Device memory that tensors do not account for; every number is an assumption.

    Attributes:
        context: CUDA context, kernels and cuBLAS workspaces, bytes.
        nccl: communicators and their channel buffers, where there is more than one rank.
        fragmentation: share of the tensors' peak that the caching allocator holds in addition, with
            ``PYTORCH_ALLOC_CONF=expandable_segments:True``.
    """

    context: int = GIB // 2
    nccl: int = 3 * GIB // 10
    fragmentation: float = 0.03


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal cards.

    Attributes:
        nodes, gpus_per_node: their numbers.
        gpu_memory: bytes of a card.
        gpu: rates, for times; None: no times.
        link: bytes/s of a node's network, one direction, of all its adapters together.
    """

    nodes: int
    gpus_per_node: int
    gpu_memory: int
    gpu: GpuRates | None = None
    link: float | None = None

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    def make_world(self, engine: EngineConfig, rank: int = 0) -> World:
        """Return the ``World`` of a rank; ``engine.kind: auto`` becomes what it is there."""
        local = rank % self.gpus_per_node
        launcher = "python" if self.ranks == 1 else "torchrun"
        launcher = "deepspeed" if engine.kind == "zero" else launcher
        return World(rank, self.ranks, local, self.gpus_per_node, launcher)


_BYTES = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE)
_BITS = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(bit|b|B)(?:/s|ps)?\s*")
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_byte_count(text: str) -> int:
    """Return the bytes of ``24GiB`` or ``24GB``; a number alone is GiB.

    Raises:
        UserError: something else, or nothing.
    """
    match = _BYTES.fullmatch(text)
    if match is None or float(match[1]) <= 0:
        raise UserError(f"{text!r} is no amount of memory; write it as 24GiB or 80GB")
    number, power = float(match[1]), match[2].upper()
    if not power and not text.strip().upper().endswith("B"):
        return int(number * GIB)
    return int(number * (1024 if match[3] else 1000) ** _POWERS[power])


def parse_link_rate(text: str) -> float:
    """Return the bytes/s of ``400Gbit`` or ``50GB`` (a second).

    Raises:
        UserError: something else, or nothing.
    """
    match = _BITS.fullmatch(text)
    if match is None or float(match[1]) <= 0:
        raise UserError(f"{text!r} is no rate of a link; write it as 400Gbit or 50GB (a second)")
    rate = float(match[1]) * 1000 ** _POWERS[match[2].upper()]
    return rate if match[3] == "B" else rate / 8
