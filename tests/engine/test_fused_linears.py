"""Linears fused with LoRA (``quant.low_rank_linear``) on two ranks, with products of torch."""

from contextlib import nullcontext
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from dist_peft.adapters.lora.layer import LoraLinear, LoraSpec
from dist_peft.core.config.run import EngineConfig, TrainConfig
from dist_peft.core.world import World
from dist_peft.engine import make_engine
from dist_peft.engine.activation_checkpointing import checkpoint_configured_blocks
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout
from dist_peft.quant import low_rank_linear
from dist_peft.quant.nf4 import Nf4Codec
from tests.support.dist import run_ranks
from tests.support.tiny_engines import CPU, Counted, Sgd
from tests.support.torch_low_rank import use_torch_kernels

pytestmark = pytest.mark.dist
WIDTH, WIDE, VOCABULARY, SAMPLES = 16, 24, 20, 4
NF4 = Nf4Codec(16)
CASES: dict[str, dict[str, Any]] = {
    "fsdp2": {"kind": "fsdp2", "share_decodes": True},
    "zero 1": {"kind": "zero", "stage": 1},
    "zero 2": {"kind": "zero", "stage": 2, "activation_checkpointing": False},
    "zero 3": {"kind": "zero", "stage": 3},
    "zero 3, results kept": {"kind": "zero", "stage": 3, "keep_results": "products"},
}
"""Stage 3 comes last: it replaces ``torch.nn.functional.linear`` in its process."""


def build_linear(columns: int, rows: int, name: str, position: DropoutPosition) -> LoraLinear:
    base = FrozenLinear(columns, rows, NF4, True, torch.bfloat16, "", "meta")
    spec = LoraSpec(r=3, scaling=1.5, arithmetic=torch.bfloat16, seed=0)
    return LoraLinear(base, name, spec, SampleDropout(0.2, name, position))


class Block(nn.Module):
    def __init__(self, number: int, position: DropoutPosition) -> None:
        super().__init__()
        self.up = build_linear(WIDTH, WIDE, f"{number}.up", position)
        self.down = build_linear(WIDE, WIDTH, f"{number}.down", position)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = x + self.down(torch.tanh(self.up(x)))
        return h


class Model(nn.Module):
    """Two blocks, and a head whose rows are gathered by hooks of the frozen linear alone."""

    def __init__(self) -> None:
        super().__init__()
        self.position = DropoutPosition(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, device="meta", dtype=torch.bfloat16)
        self.embedding.requires_grad_(False)
        self.blocks = nn.ModuleList(Block(number, self.position) for number in range(2))
        self.head = build_linear(WIDTH, VOCABULARY, "head", self.position)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head.base

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).requires_grad_()
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


class Outcome(NamedTuple):
    losses: list[float]
    parameters: dict[str, Tensor]
    fused: int
    decodes: int


def draw(name: str, parameter: Tensor, linear: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
    if isinstance(linear, FrozenLinear) and parameter.dtype == torch.uint8:
        shape = (linear.out_features, linear.in_features)
        return NF4.quantize_to_packed(torch.randn(shape, generator=generator) / 4)
    return (torch.randn(parameter.shape, generator=generator) / 4).to(parameter.dtype)


def train(world: World, options: dict[str, Any], fuses: bool = True) -> Outcome:
    """Two steps of four samples, one or two in a micro-batch."""
    config = EngineConfig(**options)
    engine, model = make_engine(config, TrainConfig(), world, CPU), Model()
    checkpoint_configured_blocks(list(model.blocks), config, CPU)
    engine.shard_model(model, list(model.blocks))
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = draw(f"{path}.{name}", parameter, module)
            rows = value[engine.local_row_span(parameter).slice].clone()
            engine.fill_local_rows(module, name, rows)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    call = engine.setup_optimizer(model, Sgd(), lambda name: 1.0)
    decode = Counted(Nf4Codec.dequantize_rows)
    with (
        use_torch_kernels() if fuses else nullcontext(),
        mock.patch.object(Nf4Codec, "dequantize_rows", decode),
        mock.patch.object(
            low_rank_linear._SavedProjection, "apply", wraps=low_rank_linear._SavedProjection.apply
        ) as fused,
    ):
        losses = []
        for step in range(2):
            rows = torch.arange(SAMPLES * 5).view(SAMPLES, 5) * (step + 1) % VOCABULARY
            total = 0.0
            ids = torch.arange(SAMPLES)[world.rank :: world.size].split(1)
            for number, own in enumerate(ids):
                model.position.begin_micro_batch(step, own)
                loss = call(rows[own]).float().square().sum() / (rows.numel() * VOCABULARY)
                total += loss.item()
                engine.backward(loss, last=number == len(ids) - 1)
            losses.append(world.sum_over_ranks(total)[0])
            assert engine.step(lr=0.5, max_norm=100.0) > 0
    after = {name: engine.gather_parameter(p) for name, p in named.items()}
    return Outcome(losses, after, fused.call_count, decode.calls)


def train_all(world: World) -> dict[str, Outcome]:
    return {case: train(world, options) for case, options in CASES.items()}


def test_engines_of_two_ranks_train_as_one_process() -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    fused = train(World(), {"kind": "single"})
    composed = train(World(), {"kind": "single"}, fuses=False)
    assert fused.fused and not composed.fused
    for name, parameter in fused.parameters.items():
        expected = composed.parameters[name]
        assert (parameter - expected).norm() <= 0.01 * expected.norm(), name
    for outcomes in run_ranks(train_all, 2):
        for case, outcome in outcomes.items():
            torch.testing.assert_close(
                torch.tensor(outcome.losses),
                torch.tensor(fused.losses),
                rtol=1e-5,
                atol=0,
                msg=case,
            )
            for name, parameter in outcome.parameters.items():
                torch.testing.assert_close(
                    parameter, fused.parameters[name], rtol=1e-4, atol=1e-6, msg=f"{case} {name}"
                )
        # blocks' linears forward and in recomputation, the head once
        micro_batches, linears = 2 * 2, 4
        assert outcomes["zero 2"].fused == micro_batches * (linears + 1)
        assert outcomes["zero 3"].fused == micro_batches * (2 * linears + 1)
        # of each block's two linears the last one is not multiplied again
        assert outcomes["zero 3"].decodes == micro_batches * (2 * linears + 2 + 2)
        assert outcomes["fsdp2"].decodes == micro_batches * (2 * linears + 2)
        assert outcomes["zero 3, results kept"].decodes == micro_batches * (2 * linears + 2)
