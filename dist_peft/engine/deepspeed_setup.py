"""Make DeepSpeed ready: its import, and a model whose frozen parameters it does not see."""

import importlib
import logging
import os
import warnings
from typing import Any

import torch
from torch import nn

from dist_peft.core.errors import UserError
from dist_peft.engine.compat import skip_deepspeed_compilation

__all__ = ["hide_frozen_parameters", "import_deepspeed"]


def hide_frozen_parameters(model: nn.Module) -> None:
    """Frozen parameters become plain attributes: found by name, in no list of parameters."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not parameter.requires_grad:
                del module._parameters[name]
                module.__dict__[name] = parameter


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed, quiet and without compiling its shared-memory collectives at start.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # else it takes a GPU where it sees one
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError:
        raise UserError(
            "engine.kind is zero but deepspeed is not installed: "
            "pip install 'dist_peft[deepspeed]', or use engine.kind: fsdp2"
        ) from None
    # DeepSpeed uses names that torch 2.13 has renamed; not fixable from this project
    warnings.filterwarnings("ignore", r".*torch\.distributed\..* is deprecated", FutureWarning)
    skip_deepspeed_compilation(deepspeed)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    return deepspeed
