"""A module of the base that is trained whole: a part of a head, or a router."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from dist_peft.model.parameter_override import override_parameters

__all__ = ["TrainedModule"]


class TrainedModule(nn.Module):
    """A module around ``base`` whose parameters are trainable float32 masters.

    They have the names that they have in the model. While ``base`` computes, rounded copies stand
    in for the parameters that were taken from it.

    Args:
        base: a module without parts; its parameters go.
        path: of it.

    Attributes:
        shapes: of the parameters, by own name.
        checkpoint_names: own name -> tensor of the base's files, for those that are there.
    """

    def __init__(self, base: nn.Module, path: str) -> None:
        super().__init__()
        self.base, self.path = base, path
        self.checkpoint_names = cast(dict[str, str], base.checkpoint_names)
        cast(Any, base).checkpoint_names = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, parameter in list(base.named_parameters(recurse=False)):
            self.shapes[name] = tuple(parameter.shape)
            master = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
            self.register_parameter(name, nn.Parameter(master))
            base.register_parameter(name, None)

    def compute_rounded(self, dtype: torch.dtype, *inputs: Tensor, **keywords: Any) -> Any:
        """Return the outputs of ``base`` with its parameters rounded to ``dtype``."""
        copies = {name: getattr(self, name).to(dtype) for name in self.shapes}
        with override_parameters(self.base, copies):
            return self.base(*inputs, **keywords)
