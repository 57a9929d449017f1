"""Models of transformers with random weights, as they are published, for ``families.py``."""

from pathlib import Path
from typing import Any

import torch
import transformers
from family_configs import small_config
from family_runs import save_tokenizer
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from dist_peft.model.model_class import choose_auto_class

__all__ = ["published_class", "reference_model", "save_converted", "save_without_weights"]

_PUBLISHED = {
    "evolla": "EvollaForProteinText2Text",
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
}
"""Types that the automatic classes of language models do not build."""


def reference_model(kind: str, directory: Path) -> nn.Module:
    """A random model, saved; norms and biases are random, too."""
    torch.manual_seed(0)
    config = small_config(kind)
    size = sum(p.numel() for p in _on_meta(config).parameters())
    if size > 1.5e8:
        raise ValueError(f"the small configuration still has {size / 1e6:.0f} M parameters")
    model = published_class(config).from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return model  # type: ignore[no-any-return]


def save_converted(model: nn.Module, directory: Path) -> None:
    """Write the tensors under the names, and in the shapes, that the model itself has."""
    for file in directory.glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(directory, save_original_format=False)  # type: ignore[operator]


def save_without_weights(kind: str, directory: Path) -> None:
    """The configuration of a type that transformers does not build, and one tensor."""
    small_config(kind).save_pretrained(directory)
    save_file({"none": torch.zeros(1)}, directory / "model.safetensors", {"format": "pt"})


def _on_meta(config: PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return published_class(config).from_config(config)  # type: ignore[no-any-return]


def published_class(config: PretrainedConfig) -> Any:
    """The class that saves a type as it is published: with its towers, where it has some."""
    if name := _PUBLISHED.get(config.model_type):
        return _OneClass(getattr(transformers, name))
    if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForImageTextToText
    return choose_auto_class({"model_type": config.model_type})


class _OneClass:
    """A class of transformers that no automatic class has."""

    def __init__(self, kind: Any) -> None:
        self.from_config = kind
