"""A tiny frozen model with bottleneck adapters, filled in one process as a run fills its shards."""

from typing import Any

import torch
import transformers as tf
from torch import nn

from dist_peft.adapters.bottleneck.layer import BottleneckLayer, TrainableNorm
from dist_peft.adapters.bottleneck.method import BottleneckAdapter
from dist_peft.adapters.directory import read_adapter_directory
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.config.run import BottleneckConfig
from dist_peft.core.span import Span, row_span
from tests.support.adapters import frozen_model, tiny_llama


def fill(adapter: BottleneckAdapter, ranks: int = 1) -> None:
    """Give every parameter its start, in the shares of so many ranks."""
    modules: list[BottleneckLayer | TrainableNorm] = [
        *adapter.layers.values(),
        *adapter.norms.values(),
    ]
    for module in modules:
        for name, shape in module.shapes.items():
            spans = [row_span(shape[0], ranks, rank) for rank in range(ranks)]
            rows = torch.cat([module.init_rows(name, span) for span in spans])
            module.register_parameter(name, nn.Parameter(rows))


def adapted(original: Any, seed: int = 3, **settings: Any) -> tuple[Any, BottleneckAdapter]:
    """A frozen copy of a model with a filled adapter."""
    model = frozen_model(original)
    adapter = BottleneckAdapter(
        BottleneckConfig(**settings),
        seed=seed,
        arithmetic=torch.float32,
        read_adapter=read_adapter_directory,
    )
    adapter.attach_to_model(model)
    fill(adapter)
    return model, adapter


def family(config: tf.PretrainedConfig) -> Any:
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config).eval()


def gathered(adapter: BottleneckAdapter) -> dict[str, torch.Tensor]:
    modules = {**adapter.layers, **adapter.norms}
    return {
        f"{path}.{name}": getattr(module, name).detach()
        for path, module in modules.items()
        for name in module.shapes
    }


def whole(size: int) -> Span:
    return Span(0, size)


def public(placement: str = "houlsby", **settings: Any) -> PublicAdapter:
    _, adapter = adapted(tiny_llama(), placement=placement, **settings)
    return adapter.to_public_adapter(gathered(adapter), "tiny/base")
