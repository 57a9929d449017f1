"""Device memory of a rank: bytes at rest, and the peak of each phase of a step.

The traced step has two of the model's ``L`` blocks. With every further block, the blocks' inputs
(until their backward), and whole gradients that stay between micro-batches, grow by what the trace
measured of one; at most one block computes at a time, so all else is as in the trace.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from dist_peft.plan.cluster import Cluster, FixedShares
from dist_peft.plan.resting import RestingBytes
from dist_peft.plan.step_trace import StepTrace

__all__ = ["MemoryItem", "MemoryPlan", "PhasePeak", "build_memory_plan", "extrapolate_phases"]

_NAMES = {
    "gathered": "gathered units",
    "dequantized": "dequantized weight",
    "forward": "activations",
    "backward": "activations",
    "embedding": "activations",
    "buffers": "activations",
    "block inputs": "block inputs",
    "gradients": "gradients",
    "head": "logits and loss",
    "logits": "logits and loss",
    "optimizer": "optimizer's temporaries",
    "step": "optimizer's temporaries",
}
"""Purpose in a trace -> item of the plan."""


@dataclass(frozen=True)
class MemoryItem:
    """One part of a rank's memory. ``kind``: rest, step (at the peak), or assumed."""

    name: str
    bytes: int
    kind: str


@dataclass(frozen=True)
class PhasePeak:
    """Largest storage of a phase beyond rest, in bytes, by item."""

    phase: str
    items: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.items.values())


@dataclass(frozen=True)
class MemoryPlan:
    """Device memory of one rank.

    Attributes:
        items: rest, step at its largest phase, assumed shares.
        phases: of a step, by what they need beyond rest.
        peak_phase: the largest of these.
        limit: bytes of the card.
    """

    items: tuple[MemoryItem, ...]
    phases: tuple[PhasePeak, ...]
    peak_phase: str
    limit: int

    @property
    def total(self) -> int:
        """Bytes needed, assumed shares included."""
        return sum(item.bytes for item in self.items)

    @property
    def allocated(self) -> int:
        """Bytes of tensors at the peak."""
        return sum(item.bytes for item in self.items if item.kind != "assumed")

    @property
    def spare(self) -> int:
        """Bytes left on the card; negative where it does not fit."""
        return self.limit - self.total

    @property
    def fits(self) -> bool:
        return self.spare >= 0


def build_memory_plan(
    resting: RestingBytes,
    phases: list[PhasePeak],
    cluster: Cluster,
    shares: FixedShares,
) -> MemoryPlan:
    """Put the parts together.

    Args:
        resting: of the rank.
        phases: of ``extrapolate_phases``.
    """
    largest = max(phases, key=lambda phase: phase.total)
    items = [MemoryItem(name, size, "rest") for name, size in resting.device.items()]
    items += [MemoryItem(name, size, "step") for name, size in largest.items.items() if size]
    tensors = sum(item.bytes for item in items)
    assumed = {
        "CUDA context": shares.context,
        "NCCL": shares.nccl if cluster.ranks > 1 else 0,
        "fragmentation": int(shares.fragmentation * tensors),
    }
    items += [MemoryItem(name, size, "assumed") for name, size in assumed.items() if size]
    return MemoryPlan(tuple(items), tuple(phases), largest.phase, cluster.gpu_memory)


def extrapolate_phases(
    trace: StepTrace,
    resting: RestingBytes,
    blocks: int,
    trainable: tuple[int, int],
    frees_kept: bool,
    kept_blocks: int = 0,
) -> list[PhasePeak]:
    """Return the peaks of a model of ``blocks`` blocks, from a step of a few.

    Args:
        resting: of the traced blocks alone.
        blocks: of the whole model.
        trainable: values of trainable parameters, of the traced blocks and of the whole model.
        frees_kept: the engine frees kept blocks with the last backward of a step.
        kept_blocks: that stay gathered (``engine.keep_gathered``), beyond those of the trace.
    """
    traced = len(trace.blocks)
    more = blocks - traced
    kept = trace.kept_gradients * (trainable[1] - trainable[0]) // max(1, trainable[0])
    reduced = trace.reduced_gradients // traced
    growth = Counter({"block inputs": more * trace.input_bytes, "gradients": kept})

    def grow(phase: str, name: str, extra: Mapping[str, int]) -> PhasePeak:
        items = Counter[str]()
        for purpose, size in trace.peaks[phase].by_purpose.items():
            if purpose not in ("adapter", "base"):
                items[_NAMES.get(purpose, purpose)] += size
        items["activations"] -= trace.resting.get("buffers", 0)
        items["gathered units"] -= resting.late_padding
        if phase != "step" or not frees_kept:  # fsdp2 frees them with the last backward
            items["gathered units"] += kept_blocks * trace.gathered_block
        items.update(extra)
        return PhasePeak(name, {k: v for k, v in items.items() if v})

    last = f"backward {traced - 1}"
    wanted: list[tuple[str, str, Mapping[str, int]]] = [
        ("embedding", "embedding", {"gradients": kept}),
        *((f"forward {n}", "forward", growth) for n in range(traced)),
        ("head", "head", growth),
        (last, "backward", growth),
    ]
    if traced > 1 and last in trace.peaks:
        # near the first block: inputs are gone, the gradients of all blocks above are there
        inputs = trace.peaks[last].by_purpose.get("block inputs", 0)
        first = Counter({"gradients": max(kept, reduced * (blocks - 2)), "block inputs": -inputs})
        wanted.append((last, "backward", first))
    wanted += [(f"backward {n}", "backward", {"gradients": kept}) for n in range(traced - 1)]
    wanted.append(("step", "step", {"gradients": reduced * more}))
    best: dict[str, PhasePeak] = {}
    # blocks below the first trained parameter have no backward pass
    for peak in (grow(*each) for each in wanted if each[0] in trace.peaks):
        if peak.phase not in best or peak.total > best[peak.phase].total:
            best[peak.phase] = peak
    return list(best.values())
