"""Which blocks of a model compute alike."""

from torch import nn

__all__ = ["block_kind"]


def block_kind(block: nn.Module) -> object:
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
                    if isinstance(value, (bool, str, float)) and key != "name_or_path"
                )
            ),
        )
        for name, module in block.named_modules()
    )
