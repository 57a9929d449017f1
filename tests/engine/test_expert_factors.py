"""Parts of factors that ranks exchange; whole runs are in ``tests/app/test_experts.py``."""

import pytest
import torch
from torch import Tensor

from dist_peft.core.span import Span, row_span
from dist_peft.engine.expert_factors import FactorRoute
from dist_peft.engine.shard_placement import ShardPlacement

R = 3
FACTORS = {"A": 0, "B": 1}
"""The dimension of the experts."""


def make_factor(name: str, experts: int, width: int) -> tuple[Tensor, Tensor]:
    """Numbers, all different, and the positions of each expert's."""
    count = experts * R
    numbers = torch.arange(count * width, dtype=torch.float32)
    places = torch.arange(count)
    if name == "A":
        return numbers.view(count, width), places.view(experts, R)
    return numbers.view(width, count), places.view(R, experts).T


def take_experts(name: str, whole: Tensor, experts: int, own: Span) -> Tensor:
    """The slow reference: the factors of these experts alone, laid out as those of all."""
    if name == "A":
        return whole.view(experts, R, -1)[own.slice].flatten(0, 1)
    return whole.view(-1, R, experts)[:, :, own.slice].flatten(1)


@pytest.mark.parametrize("dimension", [0, 1])
@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize(("experts", "ranks"), [(4, 2), (5, 3), (2, 5), (8, 8), (3, 1)])
def test_each_rank_gets_the_factors_of_its_experts(
    experts: int, ranks: int, name: str, dimension: int
) -> None:
    """And gradients come back to where the numbers rest, each once."""
    whole, positions = make_factor(name, experts, width=10)
    placement = ShardPlacement(tuple(whole.shape), ranks, dimension)
    spans = [row_span(experts, ranks, rank) for rank in range(ranks)]
    routes = [
        FactorRoute(placement, FACTORS[name], positions, spans, rank) for rank in range(ranks)
    ]
    kept = [
        whole.narrow(dimension, own.start, len(own))
        for own in (placement.local_span(rank) for rank in range(ranks))
    ]
    sent = [route.take_kept(part) for route, part in zip(routes, kept, strict=True)]
    used = []
    for rank, route in enumerate(routes):
        arrived = [pieces[rank] for pieces in sent]
        assert [len(piece) for piece in arrived] == [piece.numel() for piece in route.arriving]
        used.append(route.put_used(arrived, whole))
        wanted = take_experts(name, whole, experts, spans[rank])
        if len(spans[rank]):
            assert torch.equal(used[rank], wanted)
        else:  # of no expert: of one, without values
            assert used[rank].shape[FACTORS[name]] == R and not used[rank].any()
        moved = sum(len(piece) for other, piece in enumerate(arrived) if other != rank)
        assert moved == wanted.numel() - len(arrived[rank])
    is_local = all(
        not len(piece) for a, pieces in enumerate(sent) for b, piece in enumerate(pieces) if a != b
    )
    assert {route.is_local for route in routes} == {is_local}
    returned = [route.take_used(part) for route, part in zip(routes, used, strict=True)]
    for rank, route in enumerate(routes):
        found = route.put_kept([pieces[rank] for pieces in returned], kept[rank])
        assert torch.equal(found, kept[rank])


def test_rows_of_whole_experts_rest_where_they_are_used() -> None:
    """``A`` of experts that ranks divide evenly; ``B`` rests on all ranks."""
    for name, wanted in (("A", True), ("B", False)):
        whole, positions = make_factor(name, 6, width=10)
        placement = ShardPlacement(tuple(whole.shape), 3, 0)
        spans = [row_span(6, 3, rank) for rank in range(3)]
        assert FactorRoute(placement, FACTORS[name], positions, spans, 1).is_local is wanted
