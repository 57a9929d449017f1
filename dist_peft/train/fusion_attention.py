"""Measure the attention of fusions on held-out sequences (``train.attention_record``)."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from dist_peft.adapters.fusion.layer import FusionLayer
from dist_peft.core.world import World
from dist_peft.data.loader import Batch, Loader, find_batch_tasks
from dist_peft.engine import Engine
from dist_peft.train.attention_record import FusionAttention
from dist_peft.train.evaluate import inference_mode
from dist_peft.train.objective import Objective

__all__ = ["find_fusion_layers", "measure_attention"]

BatchT = TypeVar("BatchT", bound=Batch)


def find_fusion_layers(model: nn.Module) -> dict[str, FusionLayer]:
    """Return the fusions of a model by path, in its order."""
    return {module.path: module for module in model.modules() if isinstance(module, FusionLayer)}


def measure_attention(
    model: nn.Module,
    layers: Mapping[str, FusionLayer],
    engine: Engine,
    objective: Objective[BatchT],
    loader: Loader[BatchT],
    world: World,
) -> FusionAttention:
    """Measure attention in one pass over the held-out sequences; the same result on every rank.

    Args:
        layers: as returned by ``find_fusion_layers``; at least one.
        loader: of the held-out sequences.
    """
    rows, first = loader.rows, next(iter(layers.values()))
    names = rows.task_names
    meter, tokens = first.meter, torch.zeros(len(names), dtype=torch.float64)
    meter.sums.clear()
    with inference_mode(model):
        for batch in loader.load_all_sequential():
            tasks = find_batch_tasks(rows, batch)
            real = (batch.sample_ids >= 0).unsqueeze(1)
            weights = (objective.mark_measured_tokens(batch) & real).float()
            tokens.index_add_(0, torch.tensor(tasks), weights.sum(1).double())
            with meter.count_attention(weights, tasks, len(names)):
                objective.compute_logits(model, batch, engine.device)
    sums = torch.stack([meter.sums[path] for path in layers])  # [layers, tasks, adapters]
    numbers = world.sum_over_ranks(*sums.flatten().tolist(), *tokens.tolist())
    sums = torch.tensor(numbers[: sums.numel()], dtype=torch.float64).view_as(sums)
    tokens = torch.tensor(numbers[sums.numel() :], dtype=torch.float64)
    means = sums / tokens[:, None]
    by_task = {name: means[:, task].tolist() for task, name in enumerate(names)}
    return FusionAttention(
        adapters=list(first.names),
        layers=list(layers),
        counted=objective.measured_tokens,
        tokens=int(tokens.sum()),
        attention=(sums.sum(1) / tokens.sum()).tolist(),
        by_task=by_task if names != ("",) else {},
    )
