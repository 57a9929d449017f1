"""Held-out loss: mean over all target tokens of the evaluation rows, in nats."""

import torch
from torch import nn

from dist_peft.adapters.base import Adapter
from dist_peft.core.world import World
from dist_peft.data.loader import Loader
from dist_peft.engine import Engine
from dist_peft.train.loop import batch_loss

__all__ = ["evaluate"]


@torch.no_grad()
def evaluate(
    model: nn.Module, engine: Engine, adapter: Adapter, loader: Loader, world: World
) -> float:
    """Every rank computes its share of the rows, the same number of batches on each."""
    adapter_modules = [m for m in model.modules() if m.training]
    model.eval()
    total, count = 0.0, 0
    for batch in loader.sequential():
        total += batch_loss(model, batch, engine.device).double().item()
        count += int((batch.labels != -100).sum())
    for module in adapter_modules:
        module.training = True
    loss, targets = world.sum(total, float(count))
    return loss / targets
