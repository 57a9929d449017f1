"""Values that no adapter can have: found when its files are read, before anything is made of it.

A NaN or an infinity spreads into every weight that it is merged into, and fractions become
integers when a tool casts a whole file: both load without a word and give a model that
computes something else.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dist_peft.core.errors import UserError

__all__ = ["check_tensor_names", "check_tensor_type", "check_tensor_values"]

_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_CHUNK = 2**24
"""Elements looked at in one go."""


def check_tensor_names(recorded: object, found: Iterable[str], place: object) -> None:
    """Check that an adapter's files (in ``place``) have exactly the tensors that were written.

    A module whose factors are all absent is one that was not adapted, as far as the files show.

    Args:
        recorded: ``tensors`` of ``dist_peft.json``; None: an adapter that records none.
        found: names in the files.

    Raises:
        UserError: a tensor is absent or was added, or ``recorded`` is no list of names.
    """
    if recorded is None:
        return
    if not isinstance(recorded, list) or not all(isinstance(name, str) for name in recorded):
        raise UserError(f"{place}/dist_peft.json is damaged: tensors must be a list of names")
    names = set(found)
    for what, left in (("lacks", set(recorded) - names), ("has", names - set(recorded))):
        if left:
            raise UserError(
                f"{place} {what} {min(left)}"
                f"{f' and {len(left) - 1} more tensors' if len(left) > 1 else ''}, "
                f"{'which was' if what == 'lacks' else 'which was not'} written with the adapter: "
                "its files were changed or are of two adapters; get the adapter again"
            )


def check_tensor_type(name: str, dtype: torch.dtype, place: object) -> None:
    """Check that the tensor ``name`` of ``place`` (a file or directory) has a type that is trained.

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
    """Check that tensors (name -> values; on meta only types are looked at) can be an adapter's.

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
