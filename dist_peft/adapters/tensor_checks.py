"""Values that no adapter can have: found when its files are read, before anything is made of it.

A NaN or an infinity spreads into every weight that it is merged into, and fractions become
integers when a tool casts a whole file: both load without a word and give a model that
computes something else.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_peft.core.errors import UserError

__all__ = ["check_tensor_type", "check_tensor_values"]

_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_CHUNK = 2**24
"""Elements looked at in one go."""


def check_tensor_type(name: str, dtype: torch.dtype, place: object) -> None:
    """See that the tensor ``name`` of ``place`` (a file or directory) has a type that is trained.

    Raises:
        UserError: integers, booleans, complex numbers or 8-bit floats.
    """
    if dtype not in _TYPES:
        own = str(dtype).removeprefix("torch.")
        known = ", ".join(str(known).removeprefix("torch.") for known in _TYPES)
        raise UserError(
            f"{place}: tensor {name} is of type {own}; tensors of an adapter are {known}. The "
            f"cast to {own} lost the trained values: get the adapter again"
        )


def check_tensor_values(tensors: Mapping[str, Tensor], place: object) -> None:
    """See that tensors (name -> values; on meta only types are looked at) can be an adapter's.

    Raises:
        UserError: see ``check_tensor_type``; or a value is NaN or infinite.
    """
    for name, value in tensors.items():
        check_tensor_type(name, value.dtype, place)
        if value.is_meta:
            continue
        for chunk in value.flatten().split(_CHUNK):
            finite = torch.isfinite(chunk)
            if not bool(finite.all()):
                first = float(chunk[~finite][0])
                raise UserError(
                    f"{place}: tensor {name} holds {first}, so whatever it is applied to would "
                    "compute nothing but NaN; the training diverged, or the file is damaged. Take "
                    "an earlier checkpoint (dist-peft train, resume: PATH), or get the adapter "
                    "again"
                )
