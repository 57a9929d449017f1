"""The decoder's layers among the lists of modules that a model has: towers have layers, too."""

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dist_peft.core.errors import UserError
from dist_peft.model.text_model import find_text_model

__all__ = ["find_decoder_blocks"]


def find_decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers: the ``ModuleList`` of modules of one class, or of layers, that the
    decoder itself has, else the largest of as many as the configuration has layers, else of any.

    Layers are of several classes in Jamba and OLMo-Hybrid. Where a model has a text model and
    towers, they are the text model's; towers inside of the decoder (Phi-4-multimodal, Chameleon)
    may be longer than it.
    """
    text = find_text_model(model)
    uniform: list[nn.Module] = [
        m for m in text.modules() if isinstance(m, nn.ModuleList) and _is_uniform(m)
    ]
    if not uniform:
        raise UserError(
            f"no list of decoder layers found in {type(model).__name__}; "
            "this model type is not supported"
        )
    decoder, count = None, None
    if isinstance(model, PreTrainedModel):
        decoder = model.get_decoder()
        count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    children = set(decoder.children()) if isinstance(decoder, nn.Module) else ()
    own = [m for m in uniform if m in children]
    if len(own) != 1:
        own = [m for m in uniform if len(list(m.children())) == count] or uniform
    return list(max(own, key=_count_modules).children())


def _count_modules(module: nn.Module) -> int:
    return sum(1 for _ in module.modules())


def _is_uniform(modules: nn.ModuleList) -> bool:
    return len({type(child) for child in modules}) == 1 or (
        len(modules) > 0 and all(isinstance(child, GradientCheckpointingLayer) for child in modules)
    )
