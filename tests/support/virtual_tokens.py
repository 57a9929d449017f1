"""Real tiny models with virtual tokens, and the same adapter in real PEFT."""

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import PeftModel
from torch import Tensor, nn

from dist_peft.adapters.directory import write_adapter_directory
from dist_peft.adapters.method_table import make_adapter
from dist_peft.adapters.virtual_tokens.method import VirtualTokensAdapter
from dist_peft.core.config.run import PrefixConfig, PromptConfig, PTuningConfig, VirtualTokensConfig
from dist_peft.core.span import Span
from tests.support.tiny_models import CONFIGS, save_model

METHODS: dict[str, VirtualTokensConfig] = {
    "prompt": PromptConfig(num_virtual_tokens=3, init="random"),
    "ptuning": PTuningConfig(num_virtual_tokens=3, encoder="lstm", encoder_hidden_size=8),
    "prefix": PrefixConfig(num_virtual_tokens=3, encoder_hidden_size=8),
}


def attach(config: VirtualTokensConfig, model: Any, *, seed: int = 0) -> VirtualTokensAdapter[Any]:
    """The adapter, attached to ``model`` and filled with its start."""
    adapter = make_adapter(config, seed=seed, arithmetic=torch.float32)
    assert isinstance(adapter, VirtualTokensAdapter)
    model.get_input_embeddings().checkpoint_names = {"weight": "model.embed_tokens.weight"}
    model.requires_grad_(False)
    adapter.attach_to_model(model)
    encoder = adapter.encoder
    for name, start in encoder.starts.items():
        rows = encoder.init_rows(name, Span(0, start.shape[0]))
        # as training leaves it: other than a random start, which the base hardly notices
        encoder.register_parameter(name, nn.Parameter(rows * 2))
    return adapter


def load(directory: Path) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=None
    ).eval()


def pair(method: str, family: str, directory: Path) -> tuple[Any, Any]:
    """The same model with the same virtual tokens: ours, and PEFT's from the saved directory."""
    save_model(CONFIGS[family], directory / "base")
    ours = load(directory / "base")
    adapter = attach(METHODS[method], ours)
    tensors = {f"prompt_encoder.{n}": p.detach() for n, p in adapter.encoder.named_parameters()}
    write_adapter_directory(
        directory / "adapter", adapter.to_public_adapter(tensors, str(directory / "base")), {}
    )
    peft = PeftModel.from_pretrained(load(directory / "base"), directory / "adapter").eval()
    return ours, peft


def random_ids(rows: int, size: int) -> Tensor:
    return torch.randint(4, 97, (rows, size), generator=torch.Generator().manual_seed(1))
