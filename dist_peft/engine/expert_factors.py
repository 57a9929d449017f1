"""Factors of LoRA on experts, of which a rank gathers those of its own experts alone.

Where tokens travel to the ranks that keep their experts (``engine.token_exchange``), a rank
multiplies with the factors of these experts only. The parameters stay as the rest of the program
knows them: whole by name, cut along rows (or columns, ``engine.shard_placement``) into a
``DTensor``, so that optimizer states and checkpoints depend neither on ranks nor on the way of the
experts. Before a product each rank gets the parts of its own experts by an all-to-all, and their
gradients go back the same way. Of two ranks and four experts, with ``r`` of 2::

    lora_A [E r, in]     rest      rows 0-3 | rows 4-7           rows of an expert lie together:
                         computes  experts 0, 1 | experts 2, 3   nothing travels
    lora_B [out, r E]    rest      rows 0..out/2 | the others    columns of an expert are E apart:
                         computes  columns 0 1 4 5 | 2 3 6 7     half of each rank's rows travel

A gather brings all ``E`` experts' parts to each of ``N`` ranks, and a reduction takes as many
gradients back; this takes ``1 / N`` of either. A gradient is that of the rows of all ranks, which
were multiplied together, so that there is nothing to add up but over replicas (HSDP).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from dist_peft.core.span import Span, row_span
from dist_peft.engine.shard_placement import ShardPlacement, choose_shard_placement
from dist_peft.model.expert_exchange import AdaptsExperts, list_expert_factors
from dist_peft.model.experts import FrozenExperts
from dist_peft.quant.assumed_device import get_assumed_device

__all__ = [
    "FactorExchange",
    "FactorOwner",
    "FactorRoute",
    "shard_expert_factors",
    "sum_over_replicas",
]


class FactorOwner(Protocol):
    """The ranks that share the factors."""

    group: dist.ProcessGroup
    device: torch.device
    parts: int
    index: int
    bytes_gathered: int


@dataclass(frozen=True)
class _Piece:
    """Elements of a factor that one rank keeps and one computes with.

    Attributes:
        kept: where they are along the experts' dimension of the keeper's part, long.
        placed: the same for the one who computes.
        across: the range of the other dimension, where the keeper has only some of it.
    """

    kept: Tensor
    placed: Tensor
    across: Span

    def numel(self) -> int:
        return len(self.kept) * len(self.across)


class FactorRoute:
    """Which elements of a factor ``[rows, columns]`` each rank keeps, and computes with.

    Args:
        placement: how it rests.
        dimension: the experts'.
        positions: of each expert along it, long ``[E, r]``.
        experts: of each rank.
        index: of this rank.

    Attributes:
        is_local: each rank keeps all that it computes with.
        shape: of the factor of this rank's experts; of one expert if there are none, which has no
            rows to be multiplied.
    """

    def __init__(
        self,
        placement: ShardPlacement,
        dimension: int,
        positions: Tensor,
        experts: Sequence[Span],
        index: int,
    ) -> None:
        self.placement, self.dimension, self.index = placement, dimension, index
        self._own = [positions[span.slice].flatten().sort().values for span in experts]
        shape = list(placement.shape)
        shape[dimension] = max(len(self._own[index]), positions.shape[1])
        self.shape = tuple(shape)
        ranks = range(len(experts))
        self.outgoing = [self._find_piece(index, other) for other in ranks]
        self.arriving = [self._find_piece(other, index) for other in ranks]
        whole = placement.shape[0] * placement.shape[1] // positions.numel()
        self.is_local = all(
            self._find_piece(rank, rank).numel() == len(self._own[rank]) * whole for rank in ranks
        )

    def _find_piece(self, keeper: int, user: int) -> _Piece:
        own, kept = self._own[user], self.placement.local_span(keeper)
        if self.placement.dimension != self.dimension:
            return _Piece(own, torch.arange(len(own), device=own.device), kept)
        is_kept = (own >= kept.start) & (own < kept.stop)
        across = Span(0, self.placement.shape[1 - self.dimension])
        return _Piece(own[is_kept] - kept.start, is_kept.nonzero().flatten(), across)

    def take_kept(self, local: Tensor) -> list[Tensor]:
        """Return the elements that each rank gets of this rank's part, flat."""
        return [local.index_select(self.dimension, piece.kept).flatten() for piece in self.outgoing]

    def put_kept(self, pieces: Sequence[Tensor], like: Tensor) -> Tensor:
        """The reverse of ``take_kept``: this rank's part, of the shape of ``like``."""
        local = torch.zeros_like(like)
        for piece, data in zip(self.outgoing, pieces, strict=True):
            shape = list(local.shape)
            shape[self.dimension] = len(piece.kept)
            local.index_copy_(self.dimension, piece.kept, data.view(shape))
        return local

    def take_used(self, whole: Tensor) -> list[Tensor]:
        """Return the elements that each rank keeps of this rank's experts, flat."""
        return [
            self._narrow(whole, piece).index_select(self.dimension, piece.placed).flatten()
            for piece in self.arriving
        ]

    def put_used(self, pieces: Sequence[Tensor], like: Tensor) -> Tensor:
        """The reverse of ``take_used``: the factors of this rank's experts."""
        whole = like.new_zeros(self.shape)
        for piece, data in zip(self.arriving, pieces, strict=True):
            part = self._narrow(whole, piece)
            shape = list(part.shape)
            shape[self.dimension] = len(piece.placed)
            part.index_copy_(self.dimension, piece.placed, data.view(shape))
        return whole

    def _narrow(self, whole: Tensor, piece: _Piece) -> Tensor:
        return whole.narrow(1 - self.dimension, piece.across.start, len(piece.across))


class FactorExchange:
    """Gets the factors of one stack's experts to the ranks that compute with them.

    Args:
        routes: of the factors, in the order in which these are passed.
        owner: the ranks.
        experts: whose exchange also counts the bytes.
    """

    def __init__(
        self, routes: Sequence[FactorRoute], owner: FactorOwner, experts: FrozenExperts
    ) -> None:
        self.routes, self.owner, self.experts = list(routes), owner, experts

    def fetch_own(self, *factors: nn.Parameter) -> tuple[Tensor, ...]:
        """Return the parts of this rank's experts, in their order; of one if there are none."""
        found: tuple[Tensor, ...] = _Fetch.apply(self, *factors)
        return found

    def exchange_kept(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Bring kept ``parts`` to the ranks that compute with them."""
        routes = self.routes
        sent = [route.take_kept(part) for route, part in zip(routes, parts, strict=True)]
        sizes = [[piece.numel() for piece in route.arriving] for route in routes]
        found = self._exchange(sent, sizes)
        return [r.put_used(f, p) for r, f, p in zip(routes, found, parts, strict=True)]

    def return_gradients(
        self, grads: Sequence[Tensor], parts: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Bring gradients of ``exchange_kept``'s results to the ranks that keep ``parts``."""
        routes = self.routes
        sent = [route.take_used(grad) for route, grad in zip(routes, grads, strict=True)]
        sizes = [[piece.numel() for piece in route.outgoing] for route in routes]
        found = self._exchange(sent, sizes)
        return [r.put_kept(f, p) for r, f, p in zip(routes, found, parts, strict=True)]

    def _exchange(
        self, sent: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]]
    ) -> list[list[Tensor]]:
        """All-to-all of pieces by factor and rank; those of a factor that rests where it is used
        stay.

        Args:
            sizes: elements that arrive, by factor and rank.
        """
        own, ranks = self.owner.index, range(self.owner.parts)
        moved = [number for number, route in enumerate(self.routes) if not route.is_local]
        found = [
            [piece if rank == own else piece[:0] for rank, piece in enumerate(pieces)]
            for pieces in sent
        ]
        if not moved:
            return found
        data = torch.cat([sent[number][rank] for rank in ranks for number in moved])
        send = [sum(sent[number][rank].numel() for number in moved) for rank in ranks]
        receive = [sum(sizes[number][rank] for number in moved) for rank in ranks]
        arrived = data.new_empty(sum(receive))
        self._count(arrived.nbytes)
        if get_assumed_device() is None:  # a plan traces steps on tensors without values
            output, flat = (t.view(torch.uint8) for t in (arrived, data))
            size = data.element_size()
            there, here = ([n * size for n in counts] for counts in (send, receive))
            dist.all_to_all_single(output, flat, here, there, group=self.owner.group)
        pieces = arrived.split([sizes[number][rank] for rank in ranks for number in moved])
        for place, number in enumerate(moved):
            found[number] = list(pieces[place :: len(moved)])
        return found

    def _count(self, count: int) -> None:
        self.owner.bytes_gathered += count
        if self.experts.exchange is not None:
            self.experts.exchange.bytes_exchanged += count


class _Fetch(torch.autograd.Function):
    """Parts of this rank's experts, whose gradients are those of the parts that it keeps."""

    @staticmethod
    def forward(ctx: Any, exchange: FactorExchange, *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.factors = exchange, factors
        return tuple(exchange.exchange_kept([_to_local(factor) for factor in factors]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts = [_to_local(factor) for factor in ctx.factors]
        found = ctx.exchange.return_gradients([grad.contiguous() for grad in grads], parts)
        needed = ctx.needs_input_grad[1:]
        wrapped = (
            _wrap(grad, factor) if is_needed else None
            for grad, factor, is_needed in zip(found, ctx.factors, needed, strict=True)
        )
        return None, *wrapped


def shard_expert_factors(
    blocks: Sequence[nn.Module], mesh: DeviceMesh, owner: FactorOwner
) -> list[nn.Parameter]:
    """Make the factors of the blocks' experts (on meta) ``DTensor`` shards, and let their modules
    get those of this rank's experts. Return the new parameters.

    Args:
        mesh: with dimension ``shard``, the last, of the ranks of ``owner``.
    """
    made: list[nn.Parameter] = []
    routes: dict[Hashable, FactorRoute] = {}
    for block in blocks:
        for experts in (m for m in block.modules() if isinstance(m, FrozenExperts)):
            for module in (m for m in experts.modules() if isinstance(m, AdaptsExperts)):
                own = _shard_module_factors(module, mesh, owner.parts)
                found = []
                for name, (dimension, positions) in module.locate_experts().items():
                    placement = choose_shard_placement(own[name], owner.parts)
                    key = (placement, dimension, positions.shape)  # of most layers the same
                    if key not in routes:
                        routes[key] = _make_route(placement, dimension, positions, owner)
                    found.append(routes[key])
                module.factor_exchange = FactorExchange(found, owner, experts)
                made += own.values()
    return made


def _make_route(
    placement: ShardPlacement, dimension: int, positions: Tensor, owner: FactorOwner
) -> FactorRoute:
    spans = [row_span(len(positions), owner.parts, part) for part in range(owner.parts)]
    return FactorRoute(placement, dimension, positions.to(owner.device), spans, owner.index)


def _shard_module_factors(
    module: AdaptsExperts, mesh: DeviceMesh, parts: int
) -> dict[str, nn.Parameter]:
    assert isinstance(module, nn.Module)
    made = {}
    for name in module.locate_experts():
        old = module._parameters[name]
        assert old is not None
        placement = choose_shard_placement(old, parts)
        shape = list(old.shape)
        shape[placement.dimension] = len(placement.local_span(mesh.get_local_rank("shard")))
        data = DTensor.from_local(
            torch.empty(shape, dtype=old.dtype, device=old.device),
            mesh,
            [*(Replicate() for _ in range(mesh.ndim - 1)), Shard(placement.dimension)],
            run_check=False,
            shape=old.shape,
            stride=old.stride(),
        )
        made[name] = nn.Parameter(data, requires_grad=old.requires_grad)
        module.register_parameter(name, made[name])
    return made


def sum_over_replicas(blocks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Add up the factors' gradients of a step over the groups that replicate (HSDP)."""
    if mesh.ndim == 1:
        return
    factors = list_expert_factors(module for block in blocks for module in block.modules())
    grads = [_to_local(p.grad) for p in factors if p.grad is not None]
    if not grads:
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat, group=mesh.get_group("replicate"))
    for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(total.view(grad.shape))


def _to_local(factor: Tensor) -> Tensor:
    data = factor.detach()
    assert isinstance(data, DTensor)
    return data.to_local()


def _wrap(grad: Tensor, factor: Tensor) -> Tensor:
    assert isinstance(factor, DTensor)
    return DTensor.from_local(
        grad,
        factor.device_mesh,
        factor.placements,
        run_check=False,
        shape=factor.shape,
        stride=factor.stride(),
    )
