"""Rows kept by the project itself: bytes come back as they went in, and rest as little as said."""

import pytest
import torch
from torch import Tensor, nn

from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.engine.activation_checkpointing import checkpoint_block_activations
from dist_peft.engine.row_shards import RowShardedParameters, _iterate_tensors
from tests.support.dist import run_ranks
from tests.support.tiny_engines import CPU, VOCAB, Model, batch, whole_values


def test_tensors_of_nested_outputs() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert list(_iterate_tensors({"x": (a, [b, None]), "y": 3})) == [a, b]


class Alone:
    """A group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def test_experts_of_a_model_without_them() -> None:
    shards = RowShardedParameters(Alone(), CPU, experts="routed")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="gather_experts: routed is for mixtures"):
        shards.shard_experts([nn.Linear(2, 2)])


class Tied(Model):
    """The head uses the embedding's weight, which is gathered for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(self.embedding.embedding_dim, VOCAB, bias=False, device="meta")
        self.head.weight = self.embedding.weight


def shard(
    world: World, kind: type[Model], recompute: bool, keep_gathered: int = 0
) -> tuple[Model, RowShardedParameters, dict[str, nn.Parameter]]:
    group = torch.distributed.group.WORLD
    assert group is not None
    model, values = kind(), whole_values()
    shards = RowShardedParameters(group, CPU, keep_gathered)
    if recompute:
        checkpoint_block_activations(list(model.blocks))
    shards.shard_model(model, list(model.blocks))
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if shards.is_row_sharded(parameter) and parameter.is_meta:
                value = values.get(f"{path}.{name}" if path else name)
                assert value is not None
                shards.fill_local_rows(
                    module, name, value[shards.local_row_span(parameter).slice].clone()
                )
    if kind is Tied:
        model.head.weight = model.embedding.weight
    return model, shards, dict(model.named_parameters())


def reference(kind: type[Model]) -> tuple[Tensor, dict[str, Tensor]]:
    model, values = kind(), whole_values()
    for path, module in model.named_modules():
        for name, old in list(module.named_parameters(recurse=False)):
            value = values.get(f"{path}.{name}" if path else name)
            if value is not None:
                setattr(module, name, nn.Parameter(value.clone(), old.requires_grad))
    if kind is Tied:
        model.head.weight = model.embedding.weight
    loss = model(batch(0)).square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def compute(world: World, kind: type[Model], recompute: bool) -> None:
    model, shards, parameters = shard(world, kind, recompute)
    frozen = {n: p for n, p in parameters.items() if not p.requires_grad}
    most = 0

    def watch(module: nn.Module, inputs: object, output: object = None) -> None:
        nonlocal most
        whole = [b for b in model.blocks if b.up.packed.untyped_storage().nbytes()]
        most = max(most, len(whole))

    for block in model.blocks:
        block.up.register_forward_hook(watch)
    want, gradients = reference(kind)
    with torch.no_grad():  # an evaluation releases everything at its end
        assert torch.equal(model(batch(0)).square().mean(), want)
    assert not any(p.untyped_storage().nbytes() for p in frozen.values())
    for _ in range(2):
        loss = model(batch(0)).square().mean()
        assert torch.equal(loss.detach(), want)
        loss.backward()
        assert not any(p.untyped_storage().nbytes() for p in frozen.values())
    for name, gradient in gradients.items():
        learned = parameters[name].grad
        assert learned is not None and torch.equal(learned, 2 * gradient), name
    assert most == 1, "the block before is released before the next computes"
    for name, value in whole_values().items():
        if name in frozen:
            assert torch.equal(shards.gather_parameter(frozen[name]), value), name


@pytest.mark.dist
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("ranks", "kind"), [(2, Model), (3, Model), (2, Tied)])
def test_same_numbers_as_the_whole_model(ranks: int, kind: type[Model], recompute: bool) -> None:
    """Losses and gradients bit for bit, and nothing whole at rest."""
    run_ranks(compute, ranks, kind, recompute)


def keep_blocks(world: World) -> None:
    """Two of three blocks stay whole and are gathered once; their rows can be replaced."""
    group = torch.distributed.group.WORLD
    assert group is not None
    model, shards, _ = shard(world, Model, False, keep_gathered=2)
    gathered = []
    for _ in range(3):
        before = shards.bytes_gathered
        model(batch(0)).square().mean().backward()
        gathered.append(shards.bytes_gathered - before)
        whole = [b.up.packed.untyped_storage().nbytes() > 0 for b in model.blocks]
        assert whole == [True, True, False]
    _, _, third_block, _, _, root = (unit.local.numel() for unit in shards._units)
    head = model.head.packed.nbytes * 34 // 33  # two ranks
    embedding = len(batch(0).unique()) * 4 * model.embedding.embedding_dim
    later = world.size * (2 * third_block + root) + head + embedding
    assert gathered[1:] == [later, later] and gathered[0] > later
    want, _ = reference(Model)
    assert torch.equal(model(batch(0)).square().mean().detach(), want)
    packed = model.blocks[0].up.packed
    zeros = torch.zeros_like(packed)[shards.local_row_span(packed).slice]
    shards.fill_local_rows(model.blocks[0].up, "packed", zeros)
    assert not torch.equal(model(batch(0)).square().mean().detach(), want)


@pytest.mark.dist
def test_kept_blocks_are_gathered_once() -> None:
    run_ranks(keep_blocks, 2)


def more_ranks_than_rows(world: World) -> None:
    group = torch.distributed.group.WORLD
    assert group is not None
    shards, model = RowShardedParameters(group, CPU), Model()
    model.embedding = nn.Embedding(2, 4, device="meta").requires_grad_(False)
    shards.shard_model(model, list(model.blocks))
    weight = model.embedding.weight
    assert len(shards.local_row_span(weight)) == (1 if world.rank < 2 else 0)
    value = torch.arange(8.0).view(2, 4)
    shards.fill_local_rows(model.embedding, "weight", value[shards.local_row_span(weight).slice])
    assert torch.equal(shards.gather_parameter(model.embedding.weight), value)


@pytest.mark.dist
def test_more_ranks_than_rows() -> None:
    run_ranks(more_ranks_than_rows, 3)
