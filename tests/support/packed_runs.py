"""Runs on bases that come quantized, trained through the quantizer, without the training."""

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from dist_peft.adapters.directory import write_adapter_directory
from dist_peft.adapters.lora.method import LoraAdapter
from dist_peft.core.config.run import BaseConfig, LoraConfig
from dist_peft.core.span import Span
from dist_peft.export.base_weights import BaseWeight
from dist_peft.export.merged_weights import open_merged_weights
from dist_peft.export.verify import Probe
from dist_peft.model.experts import ExpertStack
from dist_peft.model.prequantized.base import open_prequantized
from dist_peft.model.skeleton import build_skeleton
from dist_peft.store.index import SafetensorsIndex
from tests.support.export_runs import FakeRun
from tests.support.prequantized_models import load

IDS = torch.arange(3, 27).unsqueeze(0) * 11 % 97


def make_packed_run(
    root: Path, base: Path, plain: Path, *, scale: float = 0.1, **options: Any
) -> FakeRun:
    """A random adapter that was trained through the quantizer of ``base``, packed from ``plain``.

    ``trained`` are the rows of training, dequantized; the probe's logits are those of the plain
    model with them.

    Args:
        scale: of the factors.
        options: of the adapter.
    """
    packed = open_prequantized(base, SafetensorsIndex.open(base))
    assert packed is not None
    settings = BaseConfig(path=str(base), compute_dtype="float32", quant=packed.quant_config)
    skeleton = build_skeleton(settings, base)
    config = LoraConfig(**{"r": 4, "alpha": 8, "through_quantizer": True, **options})
    adapter = LoraAdapter(config, seed=0, arithmetic=torch.float32)
    adapter.attach_to_model(skeleton.model)
    generator = torch.Generator().manual_seed(5)
    tensors = {
        f"{path}.{name}": torch.randn(shape, generator=generator) * scale
        for path, layer in adapter.layers.items()
        for name, shape in layer.shapes.items()
    }
    public = adapter.to_public_adapter(tensors, str(base))
    write_adapter_directory(root / "adapter", public, {})
    model = tf.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    trained = dict[str, Tensor]()
    with open_merged_weights(settings, base, root / "adapter", "trained") as walk:
        for weight in walk.weights:
            if walk.is_packable(weight):
                rows = walk.read_merged_rows(weight, Span(0, weight.num_rows))
                _set_weight(model, weight, rows)
                trained[weight.name] = rows
    with torch.no_grad():
        before, after = (
            m(input_ids=IDS, use_cache=False).logits for m in (load(base).model, model)
        )
    return FakeRun(settings, base, root / "adapter", Probe(IDS, after, before), trained)


def _set_weight(model: tf.PreTrainedModel, weight: BaseWeight, rows: Tensor) -> None:
    """Put a tensor of the files into the parameter of ``transformers`` that has it."""
    is_stack = isinstance(weight.linear, ExpertStack)
    name = weight.path.removesuffix(".weight") if is_stack else weight.path
    value = model.get_parameter(name).data
    if weight.is_transposed:
        value.copy_(rows)
    else:
        value.view(-1, value.shape[-1])[weight.first : weight.first + len(rows)] = rows
