"""Write a directory of safetensors files whose rows come over hours; one rename publishes it."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from dist_peft.store.publish import publish_directory
from dist_peft.store.writer import MAX_FILE_BYTES, StreamWriter, TensorSpec

__all__ = ["StagedModel"]


class StagedModel:
    """A ``StreamWriter`` into the hidden directory of ``publish_directory``.

    A context manager: leaving it normally publishes, leaving it by an exception leaves nothing.

    Attributes:
        directory: the hidden directory, for further files.
    """

    def __init__(
        self, out: Path, tensors: Sequence[TensorSpec], max_file_bytes: int = MAX_FILE_BYTES
    ) -> None:
        """Create the files at full size, without data.

        Args:
            out: the final directory; an older one is replaced, so ``check_output_free`` comes first
                where it may be the user's.
            tensors, max_file_bytes: see ``StreamWriter``.

        Raises:
            UserError: too little space, no permission, or another process writes the same output.
        """
        with ExitStack() as stack:
            self.directory = stack.enter_context(publish_directory(out))
            self._writer = StreamWriter(self.directory, tensors, max_file_bytes)
            stack.enter_context(self._writer)
            self._stack = stack.pop_all()

    def write_rows(self, name: str, rows: Tensor, start: int = 0) -> None:
        """Write rows ``[start, start + len(rows))`` of a tensor; see ``StreamWriter``."""
        self._writer.write_rows(name, rows, start)

    def close_files(self) -> None:
        """Check that every row was written, so that ``directory`` can be read. Idempotent.

        Raises:
            ValueError: rows are missing.
            UserError: the disk is full.
        """
        self._writer.close()

    def publish(self) -> None:
        """Check that every row was written, and let the directory appear. Idempotent.

        Raises:
            ValueError: rows are missing; nothing is published.
            UserError: the disk is full.
        """
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)
