"""Objects that a ``with`` statement closes."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

__all__ = ["ClosedAtExit"]


class ClosedAtExit(ABC):
    """A base class: ``with`` gives the object itself, and calls ``close`` at its end."""

    @abstractmethod
    def close(self) -> None:
        """Release everything that the object holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
