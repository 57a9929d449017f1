"""Which blocks of a model compute alike."""

import torch
from torch import nn

__all__ = ["BlockKind", "block_kind"]

BlockKind = tuple[
    tuple[
        str,
        type[nn.Module],
        tuple[tuple[str, torch.Size, torch.dtype], ...],
        tuple[tuple[str, str], ...],
    ],
    ...,
]
"""Of each module: its name, class, parameters and settings."""

_NAMES = ("name_or_path", "source")
"""Settings that name files or their tensors and compute nothing."""


def block_kind(block: nn.Module) -> BlockKind:
    """Return a key equal for blocks that compute alike: classes, shapes, plain settings."""
    return tuple(
        (
            name,
            type(module),
            tuple((n, p.shape, p.dtype) for n, p in module._parameters.items() if p is not None),
            tuple(
                sorted(
                    (key, str(value))
                    for key, value in module.__dict__.items()
                    if isinstance(value, (bool, str, float)) and key not in _NAMES
                )
            ),
        )
        for name, module in block.named_modules()
    )
