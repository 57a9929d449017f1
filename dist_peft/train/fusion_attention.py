"""Attention of fusions on held-out sequences: ``fusion_attention.json`` of a run.

::

    {"adapters": ["rte", "mrpc"], "layers": ["model.layers.0.output_adapters", ...],
     "counted": "target tokens", "tokens": 1432,
     "attention": [[0.41, 0.59], ...],                       layer x adapter, rows sum to 1
     "by_task": {"rte": [[0.62, 0.38], ...], ...}}           with several held-out sources

Each number is a mean over tokens: those whose prediction contributes to the loss (``target
tokens``), in classification all but the padding (``tokens``). Sums are taken over all ranks, so
that the file does not depend on their number.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self, TypeVar

import torch
from torch import nn

from dist_peft.adapters.fusion.layer import FusionLayer
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.data.loader import Batch, Loader, find_batch_tasks
from dist_peft.engine import Engine
from dist_peft.store.writer import write_atomically
from dist_peft.train.evaluate import inference_mode
from dist_peft.train.objective import Objective

__all__ = ["FusionAttention", "find_fusion_layers", "measure_attention"]

_FILE = "fusion_attention.json"
_SITES = {"attention_adapters": "attention", "output_adapters": "MLP"}

Table = list[list[float]]

BatchT = TypeVar("BatchT", bound=Batch)


@dataclass(frozen=True)
class FusionAttention:
    """Mean attention of each fusion to each adapter over held-out tokens.

    Attributes:
        adapters: names of the fused adapters.
        layers: paths of the fusions.
        counted: kind of tokens that the mean is over.
        tokens: number of tokens.
        attention: ``[layers][adapters]``.
        by_task: the same for each of several held-out sources.
    """

    adapters: list[str]
    layers: list[str]
    counted: str
    tokens: int
    attention: Table
    by_task: dict[str, Table]

    def format_layer_labels(self) -> list[str]:
        """Return a short name for each fusion: its block's number, and its place if a block has
        two."""
        several = len({path.rpartition(".")[2] for path in self.layers}) > 1
        return [
            f"{''.join(re.findall(r'[.]([0-9]+)[.]', path)[-1:])}"
            f"{' ' + _SITES[path.rpartition('.')[2]] if several else ''}"
            for path in self.layers
        ]

    def write_json(self, run_dir: Path) -> None:
        """Write ``fusion_attention.json``.

        Raises:
            UserError: the disk is full.
        """
        write_atomically(run_dir / _FILE, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read_json(cls, run_dir: Path) -> Self | None:
        """Read ``fusion_attention.json``; None if it does not exist.

        Raises:
            UserError: the file is damaged.
        """
        path = run_dir / _FILE
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it") from None


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
