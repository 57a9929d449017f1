"""From the data section to the loaders of a run."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_peft.core.config import DataSource, RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.data.loader import Loader
from dist_peft.data.rows import RowSet, load_rows
from dist_peft.model.hub import Tokenizer

__all__ = ["Loaders", "make_loaders"]

log = logging.getLogger("dist_peft")

PROBE_TOKENS = 64


@dataclass
class Loaders:
    """Training rows, held-out rows, and a few tokens to compare logits on."""

    train: Loader
    eval: Loader | None
    probe: Tensor


def make_loaders(config: RunConfig, tokenizer: Tokenizer, world: World) -> Loaders:
    """Tokenize (once a node, the others read the cache) and lay out the rows of this rank.

    Raises:
        UserError: on every rank: unreadable, empty or misfit data, or more ranks than rows.
    """
    train = _rows(config, config.data.train, "train", tokenizer, world)
    held_out = (
        _rows(config, config.data.eval, "eval", tokenizer, world) if config.data.eval else None
    )
    batch = config.train.global_batch
    for count, what in ((batch, "train.global_batch"), (len(train), "rows in data.train")):
        if count < world.size:
            raise UserError(
                f"{world.size} ranks but only {count} {what}: some ranks would never work; "
                f"start at most {count} processes or enlarge {what.rpartition(' ')[2]}"
            )
    if batch % world.size:
        log.warning(
            "train.global_batch %d is no multiple of %d ranks: some ranks idle in each step",
            batch,
            world.size,
        )
    tokens, _, _ = (held_out or train).row(0)
    probe = torch.as_tensor(tokens[:PROBE_TOKENS], dtype=torch.long).unsqueeze(0)
    eval_loader = None if held_out is None else _loader(config, held_out, tokenizer, world)
    return Loaders(_loader(config, train, tokenizer, world), eval_loader, probe)


def _rows(
    config: RunConfig, sources: list[DataSource], name: str, tokenizer: Tokenizer, world: World
) -> RowSet:
    rows: RowSet | None = None
    for first in (True, False):
        with world.together(f"read data.{name}"):
            if world.is_first_of_node == first:
                rows = load_rows(config.data, sources, tokenizer, name=name)
    assert rows is not None
    return rows


def _loader(config: RunConfig, rows: RowSet, tokenizer: Tokenizer, world: World) -> Loader:
    return Loader(
        rows,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        seed=config.train.seed,
        shuffle=config.train.shuffle,
        rank=world.rank,
        world_size=world.size,
        seq_len=config.data.seq_len,
        pad_id=tokenizer.pad_token_id or 0,
    )
