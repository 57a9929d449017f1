"""Models of full width with random weights: no file holds them, no memory holds them twice.

The skeleton, the loader, the codecs and the engine are those of a run; only the reader returns
random rows, the same ones again and again, instead of a file's.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_peft.adapters.protocol import Adapter
from dist_peft.core.config.run import RunConfig
from dist_peft.core.span import Span
from dist_peft.data.loader import Batch
from dist_peft.engine import make_engine
from dist_peft.engine.activation_checkpointing import checkpoint_configured_blocks
from dist_peft.model.load import load_model
from dist_peft.plan.cluster import Cluster
from dist_peft.plan.planned_model import build_planned_model
from dist_peft.store.reader import RowReader
from dist_peft.train.loop import TrainingStep
from dist_peft.train.objective import TokenObjective
from dist_peft.train.optimizers import make_optimizer_factory

__all__ = [
    "BASES",
    "SIZES",
    "TINY",
    "RandomModel",
    "build_random_model",
    "make_packed_batch",
    "shrink_base",
]

BASES = Path(__file__).parents[2] / "configs" / "bases"
DOCUMENTS = 4
TINY = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 1000,
}


_DENSE = {"hidden_size": 5120, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
SIZES = {
    "sizes-14b": {
        **_DENSE,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "sizes-32b": {
        **_DENSE,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
    },
}
"""Sizes of Qwen3 14B and 32B, in Llama's architecture."""


class RandomReader(RowReader):
    """Rows of 2^20 random numbers, repeated; vectors (norms) are 1."""

    def read_rows(self, name: str, span: Span | None = None, columns: Span | None = None) -> Tensor:
        info = self.index.find_tensor(name)
        span = Span(0, info.num_rows) if span is None else span
        shape = (len(span), *info.shape[1:])
        if len(info.shape) < 2:
            return torch.ones(shape, dtype=info.dtype)
        if not hasattr(self, "_numbers"):
            generator = torch.Generator().manual_seed(0)
            self._numbers = (torch.randn(2**20, generator=generator) * 0.02).to(info.dtype)
        size = torch.Size(shape).numel()
        # each row where it is in the whole tensor: ranks hold parts of one model
        start = span.start * torch.Size(info.shape[1:]).numel() % len(self._numbers)
        copies = -(-(start + size) // len(self._numbers))
        return self._numbers.repeat(copies)[start : start + size].view(shape)


@dataclass
class RandomModel:
    """A loaded model and its training step."""

    model: nn.Module
    adapter: Adapter
    step: TrainingStep
    lr: float

    def take_step(self, index: int, batches: list[Batch], targets: int) -> float:
        """Accumulate the gradients of ``batches``, update; return the summed loss over targets."""
        loss = self.step.accumulate_gradients(index, batches, targets)
        self.step.update_parameters(index, loss, self.lr, 1.0)
        return float(loss)


def shrink_base(sizes: dict[str, int], file: Path) -> Path:
    """Write ``config.json`` of Llama-3.1-8B with other sizes."""
    tree = json.loads((BASES / "llama-3.1-8b.json").read_text())
    tokens = {"bos_token_id": 1, "eos_token_id": 2}  # within a small vocabulary
    file.write_text(json.dumps({**tree, **tokens, **sizes}))
    return file


def build_random_model(
    config: RunConfig,
    base: Path,
    scratch: Path,
    device: torch.device,
    world_size: int = 1,
    rank: int = 0,
) -> RandomModel:
    """Build, shard and fill the model of ``config`` with the shapes of ``base``, a ``config.json``.

    Args:
        scratch: for sparse files with headers alone.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    planned = build_planned_model(config, base, scratch)
    world = Cluster(1, world_size, 80 * 2**30).make_world(config.engine, rank=rank)
    skeleton, adapter = planned.skeleton, planned.adapter
    engine = make_engine(config.engine, config.train, world, device)
    checkpoint_configured_blocks(skeleton.blocks, config.engine, device)
    engine.shard_model(skeleton.model, skeleton.blocks)
    with RandomReader(skeleton.index) as reader:
        load_model(skeleton.model, reader, engine, device)
    call: Any = engine.setup_optimizer(
        skeleton.model, make_optimizer_factory(config.train, device), adapter.get_lr_scale
    )
    step = TrainingStep(skeleton.model, call, engine, adapter, TokenObjective(), world)
    return RandomModel(skeleton.model, adapter, step, config.train.lr)


def make_packed_batch(length: int, vocabulary: int, index: int) -> Batch:
    """One row of four documents; the last token of each has no target."""
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(3, vocabulary, (1, length), generator=generator)
    size = length // DOCUMENTS
    positions = (torch.arange(length) % size)[None]
    labels = ids.roll(-1, 1)
    labels[0, size - 1 :: size] = -100
    return Batch(ids, labels, positions, torch.tensor([index]))
