"""Count the objects that ranks exchange as pickles, through torch or a library over it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch.distributed import distributed_c10d


@contextmanager
def count_pickles() -> Iterator[list[str]]:
    """Yield a list that receives the name of each packing or unpacking of an object."""
    found: list[str] = []

    def spy(name: str) -> Any:
        real = getattr(distributed_c10d, name)

        def count(*args: Any, **options: Any) -> Any:
            found.append(name)
            return real(*args, **options)

        return mock.patch.object(distributed_c10d, name, count)

    with spy("_object_to_tensor"), spy("_tensor_to_object"):
        yield found
