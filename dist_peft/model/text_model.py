"""The part of a wrapper that computes with tokens, and the towers next to it."""

from collections.abc import Callable
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

__all__ = ["find_text_model", "make_tower_predicate"]


def find_text_model(model: nn.Module) -> nn.Module:
    """Return the part of a model that computes with tokens; the model where it has no others."""
    config: Any = getattr(model, "config", None)
    if config is None or config.get_text_config() is config or config.is_encoder_decoder:
        return model
    found = cast(Any, model).get_decoder()
    return found if isinstance(found, nn.Module) else model


def make_tower_predicate(model: PreTrainedModel) -> Callable[[str], bool]:
    """Return a predicate on full names: whether a parameter is a tower's, which a forward of tokens
    does not read, so that the files may have it in a form that is not known here."""
    text = find_text_model(model)
    if text is model:
        return lambda name: False
    ends = (text, model.get_input_embeddings(), model.get_output_embeddings())
    known = {id(p) for end in ends if end is not None for p in end.parameters()}
    towers = {name for name, p in model.named_parameters() if id(p) not in known}
    return lambda name: name in towers
