"""A tiny frozen model with a fusion of adapters on disk, filled in one process."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_peft.adapters.directory import read_adapter_directory, write_adapter_directory
from dist_peft.adapters.fusion.method import FusionAdapter
from dist_peft.core.config.run import FusionConfig
from dist_peft.core.span import row_span
from tests.support.adapters import adapter_modules, disturb, frozen_model, tiny_llama
from tests.support.bottlenecks import adapted, gathered

NAMES = ("rte", "mrpc", "keys")  # the last one is a method of nn.ModuleDict


def save_adapters(directory: Path, original: Any = None, **settings: Any) -> list[dict[str, str]]:
    """Adapters of different widths as after training; gives ``adapter.adapters``."""
    for number, name in enumerate(NAMES):
        own = {"reduction_factor": 4 + 2 * number, **settings}
        model, adapter = adapted(original or tiny_llama(), seed=number, **own)
        disturb(model)
        public = adapter.to_public_adapter(gathered(adapter), "tiny/base")
        write_adapter_directory(directory / name, public, {})
    return [{"path": str(directory / name)} for name in NAMES]


def fused(
    adapters: list[dict[str, str]], original: Any = None, ranks: int = 1, **settings: Any
) -> tuple[Any, FusionAdapter]:
    """A frozen copy of a model with a filled fusion, each rank giving its share of the rows."""
    model = frozen_model(original or tiny_llama())
    config = FusionConfig.model_validate({"adapters": adapters, **settings})
    adapter = FusionAdapter(
        config, seed=3, arithmetic=torch.float32, read_adapter=read_adapter_directory
    )
    adapter.attach_to_model(model)
    for module in adapter_modules(model).values():
        for name, shape in module.shapes.items():
            trains = getattr(module, name).requires_grad
            spans = [row_span(shape[0], ranks, rank) for rank in range(ranks)]
            rows = torch.cat([module.init_rows(name, span) for span in spans])
            module.register_parameter(name, nn.Parameter(rows, requires_grad=trains))
    return model, adapter
