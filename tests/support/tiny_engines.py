"""A tiny model with what engines must handle, and three steps of training on any of them."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dist_peft.core.config.run import EngineConfig, TrainConfig
from dist_peft.core.world import World
from dist_peft.engine import Engine, make_engine
from dist_peft.engine.activation_checkpointing import checkpoint_block_activations
from dist_peft.engine.shard_placement import choose_shard_placement
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.quant.codec import RawCodec
from dist_peft.quant.nf4 import Nf4Codec

CPU = torch.device("cpu")
WIDTH, HIDDEN, VOCAB, BLOCKS, THIN = 64, 101, 33, 3, 63


class Block(nn.Module):
    """A frozen norm, two frozen linears (101 and 64 rows) and two small trainable changes, of which
    one has two rows only: three ranks share out its columns."""

    def __init__(self) -> None:
        super().__init__()
        nf4, raw = Nf4Codec(64, double_quant=True), RawCodec(torch.float32)
        self.norm = nn.LayerNorm(WIDTH, device="meta", dtype=torch.bfloat16).requires_grad_(False)
        self.up = FrozenLinear(WIDTH, HIDDEN, nf4, False, torch.float32, "", "meta")
        self.down = FrozenLinear(HIDDEN, WIDTH, raw, True, torch.float32, "", "meta")
        self.change = nn.Parameter(torch.empty(WIDTH, WIDTH, device="meta"))
        self.thin = nn.Parameter(torch.empty(2, THIN, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        # autograd saves the norm's weight, whose storage comes and goes
        h = nn.functional.layer_norm(x, (WIDTH,)) * self.norm.weight + self.norm.bias
        thin = nn.functional.pad(h[..., :THIN] @ self.thin.T @ self.thin, (0, WIDTH - THIN))
        return x + self.down(torch.tanh(self.up(h))) + h @ self.change.T + thin


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH, device="meta")
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        raw = RawCodec(torch.float32)
        self.head = FrozenLinear(WIDTH, VOCAB, raw, False, torch.float32, "", "meta")
        self.last = nn.Parameter(torch.empty(WIDTH, device="meta"), requires_grad=False)
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)
        self.embedding.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.last * self.scale)


def whole_values() -> dict[str, Tensor]:
    """Every parameter's whole value, the same in each process."""
    values = {}
    for index, (name, parameter) in enumerate(Model().named_parameters()):
        generator = torch.Generator().manual_seed(index)
        if parameter.dtype == torch.uint8:
            linear = Model().get_submodule(name.rpartition(".")[0])
            assert isinstance(linear, FrozenLinear)
            weight = torch.randn(linear.out_features, linear.in_features, generator=generator)
            values[name] = linear.codec.quantize_to_packed(weight * 0.1)
        else:
            value = torch.randn(parameter.shape, generator=generator) * 0.1
            values[name] = value.to(parameter.dtype)
    return values


class Sgd:
    wants_plain = False
    moment_names: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def build_optimizer(self, groups: list[dict]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=1.0)


def filled(world: World, config: EngineConfig, recompute: bool = False) -> tuple[Model, Engine]:
    """The model on its engine, every parameter filled with ``whole_values``."""
    engine = make_engine(config, TrainConfig(), world, CPU)
    model, values = Model(), whole_values()
    if recompute:
        checkpoint_block_activations(list(model.blocks), share_decodes=config.share_decodes)
    engine.shard_model(model, list(model.blocks))
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = values[f"{path}.{name}" if path else name]
            engine.fill_local_rows(
                module, name, value[engine.local_row_span(parameter).slice].clone()
            )
    return model, engine


@dataclass
class Outcome:
    losses: list[float]
    parameters: dict[str, Tensor]
    gathered: list[int]
    decodes: int  # of the blocks' NF4 weights


class Counted:
    """A method that counts its calls."""

    def __init__(self, method: Any) -> None:
        self.method, self.calls = method, 0

    def __get__(self, owner: Any, kind: type) -> Any:
        return partial(self, owner)

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.method(*args)


def train(world: World, config: EngineConfig, micro: int, recompute: bool = False) -> Outcome:
    """Three steps of 12 rows; what comes out must not depend on the world."""
    model, engine = filled(world, config, recompute)
    parameters = dict(model.named_parameters())
    call = engine.setup_optimizer(model, Sgd(), lambda name: 1.0)
    losses, gathered = [], []
    count = Counted(Nf4Codec.dequantize_rows)
    stack = ExitStack()
    stack.enter_context(mock.patch.object(Nf4Codec, "dequantize_rows", count))
    for step in range(3):
        mine = batch(step)[world.rank :: world.size].split(micro)
        total, before = 0.0, engine.bytes_gathered
        for number, rows in enumerate(mine):
            loss = call(rows).square().sum() / batch(step).numel()
            total += loss.item()
            engine.backward(loss, last=number == len(mine) - 1)
        losses.append(world.sum_over_ranks(total)[0])
        assert engine.step(lr=0.05, max_norm=1.0) > 0
        gathered.append(engine.bytes_gathered - before)
    stack.close()
    values = whole_values()
    after = {name: engine.gather_parameter(p) for name, p in parameters.items()}
    for name, parameter in after.items():
        learns = name.endswith((".change", ".thin"))
        assert torch.equal(parameter, values[name]) != learns, f"{name}: changed or not"
    return Outcome(losses, after, gathered, count.calls)


def batch(step: int) -> Tensor:
    """Twelve rows of five tokens."""
    return torch.randint(VOCAB, (12, 5), generator=torch.Generator().manual_seed(step))


def padded_bytes(parts: int, prefix: str, learns: bool = True, align: int = 1) -> int:
    """What one gather of the parameters under ``prefix`` brings, padded to equal shards.

    ``learns``: with those that train. ``align``: each parameter's share is padded to a multiple.
    """
    total = 0
    for name, p in Model().named_parameters():
        if name.startswith(prefix) and (learns or not p.requires_grad):
            placement = choose_shard_placement(p, parts)
            part = placement.count_padded_elements() * p.element_size()
            total += parts * -(-part // align) * align
    return total


def embedding_bytes(parts: int, rank: int, micro: int) -> list[int]:
    """Bytes of the embedding that ``rank`` gets in each step of ``train``: the rows of its tokens,
    or the whole table where all ranks ask for as much as that."""
    row, padded, found = 4 * WIDTH, -(-VOCAB // parts) * parts, []
    for step in range(3):
        shares = [batch(step)[r::parts].split(micro) for r in range(parts)]
        total = 0
        for rows in zip(*shares, strict=True):
            wanted = [len(ids.unique()) for ids in rows]
            takes_rows = sum(wanted) * (row + 8) < parts * padded * row
            total += (wanted[rank] if takes_rows else padded) * row
        found.append(total)
    return found


def assert_same(outcome: Outcome, expected: Outcome) -> None:
    torch.testing.assert_close(
        torch.tensor(outcome.losses), torch.tensor(expected.losses), rtol=1e-6, atol=0
    )
    for name, parameter in outcome.parameters.items():
        torch.testing.assert_close(
            parameter, expected.parameters[name], rtol=1e-5, atol=1e-7, msg=name
        )


def assert_same_bits(outcome: Outcome, expected: Outcome) -> None:
    """Losses, parameters and bytes on the wire are equal."""
    assert (outcome.losses, outcome.gathered) == (expected.losses, expected.gathered)
    for name, parameter in outcome.parameters.items():
        assert torch.equal(parameter, expected.parameters[name]), name
