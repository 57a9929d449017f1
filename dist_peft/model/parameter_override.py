"""Computing with other tensors in the place of a module's parameters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

__all__ = ["override_parameters"]


@contextmanager
def override_parameters(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """While it lasts, ``module`` reads ``tensors`` where it reads its parameters of these names.

    They are attributes of the instance, which Python finds before registered parameters. Those are
    left alone: engines count on which objects are registered, and may have put attributes of their
    own there (``engine.zero``), which come back.
    """
    own = module.__dict__
    before = {name: own[name] for name in tensors if name in own}
    own.update(tensors)
    try:
        yield
    finally:
        for name in tensors:
            del own[name]
        own.update(before)
