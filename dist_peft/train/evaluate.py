"""Held-out loss: mean over all target tokens of the evaluation rows, in nats."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dist_peft.core.world import World
from dist_peft.data.loader import Loader
from dist_peft.engine import Engine
from dist_peft.train.loop import batch_loss

__all__ = ["evaluate", "inference"]


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout in adapters."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def evaluate(model: nn.Module, engine: Engine, loader: Loader, world: World) -> float:
    """Every rank computes its share of the rows, the same number of batches on each."""
    total, count = 0.0, 0
    with inference(model):
        for batch in loader.sequential():
            total += batch_loss(model, batch, engine.device).double().item()
            count += int((batch.labels != -100).sum())
    loss, targets = world.sum(total, float(count))
    return loss / targets
