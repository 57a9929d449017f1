"""Models that predict nothing from tokens alone: refused before anything is loaded.

Captioners, speech recognizers and robots' policies are registered as language models too. Some
state the input that they want in their signature, others raise an error that names it; a few have
no forward at all, as they consist of models that are run one after the other while generating.
"""

import inspect
import traceback
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from dist_peft.core.errors import UserError
from dist_peft.model.model_class import is_language_model

__all__ = ["refuse_other_inputs", "refuse_wanted_inputs"]


def refuse_other_inputs(model: PreTrainedModel, path: str) -> None:
    """Refuse a model whose forward does not take tokens alone, by its signature.

    Args:
        path: ``base.path``, for messages.

    Raises:
        UserError: names the inputs, or the parts of a model without a forward.
    """
    kind = f"base.path {path} of type {model.config.model_type!r}"
    if type(model).forward is nn.Module.forward:
        parts = [name for name, m in model.named_children() if _predicts_text(m)]
        part = parts[0] if parts else "the part that predicts text"
        raise UserError(
            f"{kind} has no forward to train, its parts are run one after the other; write the "
            f"part that predicts text with transformers ({type(model).__name__}.from_pretrained"
            f"(...).{part}.save_pretrained(DIR)) and give DIR"
        )
    wanted = [
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and name not in ("input_ids", "attention_mask")
    ]
    if wanted:
        raise UserError(
            f"{kind} predicts nothing from text alone: {type(model).__name__} wants "
            f"{' and '.join(wanted)}; only text is trained here, give another base"
        )


def refuse_wanted_inputs(model: PreTrainedModel, error: Exception, path: str) -> None:
    """Refuse a model whose code has raised ``error`` in a forward of tokens alone.

    Only an error that the family's own code raises counts. Others may be of the fake tensors that
    the forward was tried with.

    Raises:
        UserError: quotes it.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if type(error) is not ValueError or not frames:
        return
    file = Path(frames[-1].filename)
    if file.name.startswith("modeling_") and (frames[-1].line or "").startswith("raise"):
        raise UserError(
            f"base.path {path} of type {model.config.model_type!r} predicts nothing from text "
            f"alone: {type(model).__name__} says {' '.join(str(error).split())[:300]!r} "
            f"({file.name}, line {frames[-1].lineno}); only text is trained here, give another base"
        )


def _predicts_text(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel) and is_language_model(module.config.model_type)
