"""Rows of a table that the tokens of each rank name: copies, and as few bytes as asked for."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_peft.core.span import row_span
from dist_peft.core.world import World
from dist_peft.engine.embedding_rows import can_look_up_rows
from dist_peft.engine.row_shards import RowShardedParameters
from dist_peft.model.frozen_embedding import FrozenEmbedding
from dist_peft.quant.assumed_device import assume_device
from dist_peft.quant.nf4 import Nf4Codec
from tests.support.dist import run_ranks

CPU = torch.device("cpu")
VOCABULARY, WIDTH = 101, 6
"""Rows that two and three ranks do not divide."""


class Scaled(nn.Embedding):
    """Gemma's: code of its own around the lookup."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3


class Ends(nn.Module):
    """An embedding, tied to the head."""

    def __init__(self, embedding: nn.Module, tied: bool) -> None:
        super().__init__()
        self.embedding, self.change = embedding, nn.Parameter(torch.ones(WIDTH))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False, device="meta").requires_grad_(False)
        if tied:
            self.head.weight = self.embedding.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids) * self.change)


def make_embedding(kind: str) -> nn.Module:
    plain = {"scaled": Scaled}.get(kind, nn.Embedding)(VOCABULARY, WIDTH, device="meta")
    plain.requires_grad_(False)
    return FrozenEmbedding(plain, Nf4Codec(8)) if kind == "packed" else plain


def make_values(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    table, head = (torch.randn(VOCABULARY, WIDTH, generator=generator) for _ in range(2))
    if kind == "packed":
        return {"packed": Nf4Codec(8).quantize_to_packed(table), "head": head}
    return {"weight": table, "head": table if kind == "tied" else head}


def list_ids(ranks: int) -> list[list[Tensor]]:
    """The ids of each rank in each micro-batch: ids of one rank only, repeated ones, the first and
    the last of the table, none on a rank, all of the table on all."""
    last = VOCABULARY - 1
    first = [[[0, last, 7], [7, 7, 50]], [[last, 33, 0]], [[1, 2, 50, 51, 100]]][:ranks]
    none = [[], [[last]], [[3]]][:ranks]
    whole = [list(range(VOCABULARY)) for _ in range(ranks)]
    one = [list(range(VOCABULARY)), [[4, 4]], [[0]]][:ranks]
    return [
        [torch.tensor(ids, dtype=torch.long) for ids in each] for each in (first, none, whole, one)
    ]


def compute(world: World, kind: str) -> None:
    group = torch.distributed.group.WORLD
    assert group is not None
    model, values = Ends(make_embedding(kind), kind == "tied"), make_values(kind)
    shards = RowShardedParameters(group, CPU)
    shards.shard_outer_units(model)
    name = "packed" if kind == "packed" else "weight"
    table = values[name]
    own = row_span(VOCABULARY, world.size, world.rank).slice
    shards.fill_local_rows(model.embedding, name, table[own])
    if kind == "tied":
        model.head.weight = model.embedding.weight
    else:
        shards.fill_local_rows(model.head, "weight", values["head"][own])
    whole = Ends(make_embedding(kind), False)
    whole.embedding.register_parameter(name, nn.Parameter(table, False))
    whole.head.weight = nn.Parameter(values["head"], False)
    parameter = model.embedding.get_parameter(name)
    found = []
    model.embedding.register_forward_hook(
        lambda *_: found.append((parameter.untyped_storage().nbytes(), shards.bytes_gathered)),
        prepend=True,  # the engine's own frees them
    )
    row = table[0].nbytes
    padded = -(-VOCABULARY // world.size) * world.size
    for ids in list_ids(world.size):
        wanted = [len(each.unique()) for each in ids]
        own_ids, before = ids[world.rank], shards.bytes_gathered
        losses = [m(own_ids).square().sum() for m in (model, whole)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
        assert torch.equal(*(m.change.grad for m in (model, whole)))
        assert not parameter.untyped_storage().nbytes()
        takes_rows = sum(wanted) * (row + 8) < world.size * padded * row
        size, gathered = found.pop()
        expected = wanted[world.rank] * row if takes_rows else padded * row
        assert gathered - before == expected and size == max(expected, row)
    # packed rows are as small as the numbers of tokens
    assert takes_rows == (kind != "packed"), "one rank asks for all rows, the others for few"
    with torch.no_grad():
        assert torch.equal(*(m.embedding(ids[world.rank].int()) for m in (model, whole)))


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "kind"), [(2, "plain"), (3, "plain"), (3, "tied"), (2, "packed"), (2, "scaled")]
)
def test_same_bits_as_the_whole_table(ranks: int, kind: str) -> None:
    run_ranks(compute, ranks, kind)


def look_up_outside(world: World, outside: int) -> str:
    group = torch.distributed.group.WORLD
    assert group is not None
    model, table = Ends(make_embedding("plain"), True), make_values("plain")["weight"]
    shards = RowShardedParameters(group, CPU)
    shards.shard_outer_units(model)
    own = row_span(VOCABULARY, world.size, world.rank).slice
    shards.fill_local_rows(model.embedding, "weight", table[own])
    token = (5, outside)[world.rank]
    try:
        found = model.embedding(torch.tensor([token]))
    except IndexError:
        return "refused"
    return "same" if torch.equal(found[0], table[token]) else "other"


@pytest.mark.dist
@pytest.mark.parametrize("outside", [VOCABULARY, -1])
def test_an_id_outside_of_the_table_fails_on_its_rank_alone(outside: int) -> None:
    assert run_ranks(look_up_outside, 2, outside) == ["same", "refused"]


class Group:
    """Rank 0 of four."""

    def size(self) -> int:
        return 4

    def rank(self) -> int:
        return 0


def trace_lookup(device: str, tokens: int) -> tuple[int, int]:
    """Return bytes of the table's storage in the lookup and bytes gathered, as a plan has them."""
    model, stored = Ends(make_embedding("plain"), True), []
    group: Any = Group()
    shards = RowShardedParameters(group, CPU)
    with assume_device(torch.device(device)):
        shards.shard_outer_units(model)
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "dist_peft.engine.row_shards.all_gather_chunks", lambda *args, **kwargs: None
            )
            shards.fill_local_rows(model.embedding, "weight", torch.empty(26, WIDTH))
            weight = model.embedding.weight
            model.embedding.register_forward_hook(
                lambda *_: stored.append(weight.untyped_storage().nbytes()), prepend=True
            )
            model.embedding(torch.arange(tokens))
    return stored[0], shards.bytes_gathered


def test_a_plan_counts_different_tokens() -> None:
    row = 4 * WIDTH
    assert trace_lookup("cpu", 9) == (9 * row, 9 * row)
    assert trace_lookup("cpu", 400) == (104 * row, 104 * row)
    assert trace_lookup("cuda", 9) == (104 * row, 104 * row)


def test_embeddings_whose_rows_can_be_looked_up() -> None:
    plain, scaled = nn.Embedding(4, 2), Scaled(4, 2)
    assert can_look_up_rows(plain, scaled) and can_look_up_rows(scaled, scaled)
    assert not can_look_up_rows(scaled, plain), "positions may be computed with"
    assert can_look_up_rows(FrozenEmbedding(plain, Nf4Codec(8)), scaled)
    assert not can_look_up_rows(nn.Linear(2, 2), plain)
    assert not can_look_up_rows(nn.Embedding(4, 2, max_norm=1.0), plain)
