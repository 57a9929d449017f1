"""Cache of small constant tensors that are built once a process and device.

``functools.cache`` would also keep a tensor that was built while a step is traced on fake tensors
(``FakeTensorMode``). Fake tensors have a shape and no values: an operator that meets one afterwards
runs on shapes alone, and the memory of its result keeps whatever it held before, without an error.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch import Tensor

__all__ = ["cache_tables"]

P = ParamSpec("P")
Tables = TypeVar("Tables", bound=Tensor | tuple[Tensor, ...])


def cache_tables(build: Callable[P, Tables]) -> Callable[P, Tables]:
    """Call ``build`` once for the same arguments, as ``functools.cache``; keep no fake tensor.

    Args:
        build: returns a tensor or a tuple of tensors; its arguments are hashable.
    """
    kept: dict[object, Tables] = {}

    @functools.wraps(build)
    def find_tables(*args: P.args, **kwargs: P.kwargs) -> Tables:
        key = (args, tuple(sorted(kwargs.items())))
        if key in kept:
            return kept[key]
        built = build(*args, **kwargs)
        tables = built if isinstance(built, tuple) else (built,)
        if all(type(table) is Tensor for table in tables):  # a fake tensor is of a subclass
            kept[key] = built
        return built

    return find_tables
