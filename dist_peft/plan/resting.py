"""Bytes that rest on each rank for the whole run, exactly, from shapes and spans.

Of every parameter a rank keeps the rows of ``core.span.row_span``, which engines use, or ``fsdp2``
the columns (``engine.shard_placement``). FSDP2 pads uneven shards to equal ones;
``engine.row_shards`` starts each at a multiple of 16 bytes. Parameters that nothing reads
(``model.parameter_readers``) are not loaded. What DeepSpeed keeps in addition to the adapters
(``zero``), read from its 0.19 and measured::

    stages 1, 2   adapters whole, a float32 copy of 1/N, two moments of 1/N, gradients 1/N (2)
    stage 3       adapters 1/N, a float32 copy of 1/N, two moments of 1/N, gradients 1/N
    AdaLoRA       two more moments of 1/N
    every stage   a bucket of ``reduce_bucket_size`` float32 gradients
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from dist_peft.core.config.run import AdaLoraConfig, RunConfig
from dist_peft.core.config.sweep_points import count_joined
from dist_peft.core.world import World
from dist_peft.engine import resolve_engine_kind
from dist_peft.engine.engine_protocol import init_adam_state
from dist_peft.engine.gather_unit import ALIGN_BYTES
from dist_peft.engine.mesh import count_shards, list_end_modules
from dist_peft.engine.outer_units import list_outer_units
from dist_peft.engine.shard_placement import ShardPlacement, choose_shard_placement
from dist_peft.engine.zero_config import build_deepspeed_config
from dist_peft.model.expert_exchange import list_expert_factors
from dist_peft.model.experts import ExpertStack
from dist_peft.model.frozen_linear import FrozenWeight
from dist_peft.model.parameter_readers import list_unread_parameters

__all__ = [
    "RestingBytes",
    "count_own_rows",
    "count_resting_bytes",
    "count_shard_ranks",
    "optimizer_state_bytes",
]

PACKED, ENDS, OTHERS = "packed base", "embedding and head", "norms, biases, other frozen"
BUFFERS, ADAPTER, OPTIMIZER = "buffers", "adapter", "optimizer state"
PADDING, BUCKET = "padding of shards", "DeepSpeed's gradient bucket"

_PAGED_FROM = 100_000  # values of a parameter's shard, bitsandbytes
_MIN_8BIT, _BLOCK = 4096, 256


@dataclass(frozen=True)
class RestingBytes:
    """Bytes of one rank at rest.

    Attributes:
        device: purpose -> bytes on the device.
        host: purpose -> bytes in host memory (offload, paged optimizer state).
        own_rows: bytes of this rank's rows of all parameters, without padding.
        frozen_rows: the frozen part of these.
        trainable: values of the trainable parameters, of the whole model.
        late_padding: of ``device``: added by FSDP2 at the first forward.
        fetched: of ``trainable``: values whose gradients travel back to where the values rest
            (``engine.expert_factors``), and are not reduced.
    """

    device: dict[str, int]
    host: dict[str, int]
    own_rows: int
    frozen_rows: int
    trainable: int
    late_padding: int
    fetched: int

    @property
    def device_total(self) -> int:
        return sum(self.device.values())


@dataclass(frozen=True)
class _Part:
    """A parameter.

    Attributes:
        is_outer: one of ``engine.outer_units``.
        experts: their number, of a stack whose experts stay whole on their ranks.
        is_fetched: factors of experts, of which a rank gathers those of its own.
    """

    parameter: nn.Parameter
    purpose: str
    is_outer: bool
    experts: int = 0
    is_fetched: bool = False

    def place_on(self, parts: int, kind: str) -> ShardPlacement:
        """Return how the parameter lies on ``parts`` ranks of an engine of ``kind``."""
        if self.experts:
            size = self.parameter.numel() // self.experts
            return ShardPlacement((self.experts, size), parts, 0)
        if kind == "fsdp2" and parts > 1 and not self.is_outer:
            return choose_shard_placement(self.parameter, parts)
        return ShardPlacement(tuple(self.parameter.shape) or (1,), parts, 0)

    @property
    def element_size(self) -> int:
        return self.parameter.element_size()


def count_shard_ranks(config: RunConfig, world: World) -> int:
    """Return over how many ranks rows are spread: 1 for ``single``."""
    return 1 if world.size == 1 else count_shards(config.engine, world)


def count_resting_bytes(
    model: nn.Module, blocks: Sequence[nn.Module], config: RunConfig, world: World
) -> RestingBytes:
    """Return the bytes that rank ``world.rank`` keeps. ``model`` is on meta and not sharded.

    Args:
        blocks: of the model that count; others are left out.

    Raises:
        UserError: ``engine.shard_group`` does not fit the ranks.
    """
    kind = resolve_engine_kind(config.engine, world)
    shards = count_shard_ranks(config, world)
    index = world.rank % shards
    device, trained = Counter[str](), list[int]()
    own = frozen = trainable = late = fetched = 0
    for part in _list_parts(model, blocks, config):
        learns = part.parameter.requires_grad
        parts = _count_parts(part, config, kind, shards)
        placement = part.place_on(parts, kind)
        size = placement.count_local_elements(index if parts > 1 else 0) * part.element_size
        device[part.purpose] += size
        own += size
        frozen += 0 if learns else size
        by_rows = kind == "zero" or part.is_outer or part.experts > 0
        padding = _count_padding(part, placement, size, kind, by_rows)
        device[PADDING] += padding
        late += 0 if by_rows else padding
        if learns:
            trainable += part.parameter.numel()
            fetched += part.parameter.numel() if part.is_fetched and kind == "fsdp2" else 0
            trained.append(size // 4)
    device[BUFFERS] = sum(b.numel() * b.element_size() for b in model.buffers())
    host = Counter[str]()
    moments = 2 if isinstance(config.adapter, AdaLoraConfig) else 0
    if kind == "zero":
        _add_deepspeed_shares(device, host, config, trainable, world.size, moments)
    else:
        on_device, paged = optimizer_state_bytes(config.train.optimizer, trained)
        on_device += 4 * moments * sum(trained)
        device[OPTIMIZER], host[OPTIMIZER] = on_device, paged
        if config.engine.cpu_offload == "params":
            for purpose in (PACKED, ENDS, OTHERS, ADAPTER, OPTIMIZER, PADDING):
                host[purpose] += device.pop(purpose, 0)
    return RestingBytes(
        {k: v for k, v in device.items() if v},
        {k: v for k, v in host.items() if v},
        own,
        frozen,
        trainable,
        late,
        fetched,
    )


def count_own_rows(
    model: nn.Module, blocks: Sequence[nn.Module], config: RunConfig, world: World
) -> tuple[int, ...]:
    """Return the bytes of each rank's rows of all parameters, for the ranks of one shard group."""
    kind, shards = resolve_engine_kind(config.engine, world), count_shard_ranks(config, world)
    alike = Counter[tuple[ShardPlacement, int]]()  # and bytes of an element
    for part in _list_parts(model, blocks, config):
        placement = part.place_on(_count_parts(part, config, kind, shards), kind)
        alike[placement, part.element_size] += 1
    return tuple(
        sum(
            count * size * placement.count_local_elements(rank if placement.shards > 1 else 0)
            for (placement, size), count in alike.items()
        )
        for rank in range(shards)
    )


def _count_parts(part: _Part, config: RunConfig, kind: str, shards: int) -> int:
    """Return over how many ranks the rows of a parameter are spread."""
    if part.parameter.requires_grad:
        return shards if kind == "fsdp2" else 1
    return shards if config.engine.shard_base else 1


def _list_parts(
    model: nn.Module, blocks: Sequence[nn.Module], config: RunConfig
) -> Iterator[_Part]:
    """Yield each parameter once with its purpose; of blocks only those in ``blocks``."""
    ends = {id(p) for m in list_end_modules(model) for p in m.parameters()}
    packed = {id(m.packed) for m in model.modules() if isinstance(m, FrozenWeight)}
    counted = {id(p) for block in blocks for p in block.parameters()}
    skipped = {id(p) for p in _list_block_parameters(model, blocks)} - counted
    skipped |= list_unread_parameters(model).keys()
    outer = {id(p) for unit in list_outer_units(model) for p in unit.parameters}
    stays = config.engine.gather_experts == "tokens" and config.engine.shard_base
    modules = list(model.modules()) if stays else []
    stacks = {id(m.packed): m.experts for m in modules if isinstance(m, ExpertStack)}
    factors = {id(p) for p in list_expert_factors(modules)}
    for parameter in model.parameters():
        key = id(parameter)
        if key in skipped:
            continue
        purpose = OTHERS
        if parameter.requires_grad:
            purpose = ADAPTER
        elif key in ends:
            purpose = ENDS
        elif key in packed:
            purpose = PACKED
        yield _Part(parameter, purpose, key in outer, stacks.get(key, 0), key in factors)


def _list_block_parameters(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[nn.Parameter]:
    chosen = {id(block) for block in blocks}
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and any(id(child) in chosen for child in module):
            return chain.from_iterable(child.parameters() for child in module)
    return iter(())


def _count_padding(
    part: _Part, placement: ShardPlacement, own: int, kind: str, by_rows: bool
) -> int:
    """Return the bytes of a rank's share beyond its ``own`` ones.

    Args:
        by_rows: ``engine.row_shards`` keeps it.
    """
    if (placement.shards == 1 and kind != "zero") or (by_rows and part.parameter.requires_grad):
        return 0
    if part.is_fetched and kind == "fsdp2":
        return 0
    whole = placement.count_padded_elements() * part.element_size
    if part.experts:
        return whole - own
    return (-(-whole // ALIGN_BYTES) * ALIGN_BYTES if by_rows else whole) - own


def optimizer_state_bytes(optimizer: str, shard_sizes: Sequence[int]) -> tuple[int, int]:
    """Return the bytes of ``train.optimizer``'s state on the device, and paged to the host.

    Args:
        shard_sizes: number of values of each trainable parameter on this rank.
    """
    device = paged = 0
    for size in shard_sizes:
        if optimizer == "adamw":
            state = init_adam_state(torch.empty(size, device="meta"))
            device += sum(t.numel() * t.element_size() for t in state.values())
            continue
        eight = optimizer.endswith("8bit") and size >= _MIN_8BIT
        moments = 2 * size * (1 if eight else 4)
        if optimizer.startswith("paged") and size >= _PAGED_FROM:
            paged += moments
        else:
            device += moments
        device += 2 * 4 * -(-size // _BLOCK) if eight else 0
    if optimizer.endswith("8bit") and any(size >= _MIN_8BIT for size in shard_sizes):
        device += 2 * 256 * 4  # the two tables of codes, shared
    return device, paged


def _add_deepspeed_shares(
    device: Counter[str],
    host: Counter[str],
    config: RunConfig,
    trainable: int,
    ranks: int,
    more_moments: int,
) -> None:
    """Add DeepSpeed's copies, moments and gradients; see the module.

    Args:
        more_moments: besides Adam's two.
    """
    share = 4 * -(-trainable // ranks)
    if config.engine.stage == 3:
        device[ADAPTER] = share
    place = host if config.engine.cpu_offload == "optimizer" else device
    place[OPTIMIZER] += (3 + more_moments) * share
    if config.engine.stage >= 2:
        place["gradients, sharded"] += share
    settings = build_deepspeed_config(config.engine, config.train, ranks)
    bucket = int(settings["zero_optimization"]["reduce_bucket_size"])
    if config.sweep is not None:  # each point has one, no larger than its parameters
        bucket = min(count_joined(config) * bucket, trainable)
    device[BUCKET] = 4 * bucket
