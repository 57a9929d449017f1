"""Write a changed base; ``store.publish`` lets the directory appear as a whole.

The first rank alone has the writer; it opens before the long work, so that a full disk is found
then. Tensors that stay as they are come from the base's files.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType

from dist_peft.core.span import Span
from dist_peft.core.world import World
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader
from dist_peft.store.staged_model import StagedModel
from dist_peft.store.writer import TensorSpec

__all__ = ["copy_base_tensors", "open_base_writer"]

_COPIED_BYTES = 64 * 2**20
"""Chunk size for copying tensors."""


@contextmanager
def open_base_writer(
    specs: Sequence[TensorSpec], out: Path, world: World
) -> Iterator[StagedModel | None]:
    """Yield the writer on rank 0, None on others; after an error nothing is left.

    Args:
        specs: all tensors of the output.
        out: final directory; it appears at the writer's ``publish``.

    Raises:
        UserError: on every rank: no space or no permission.
    """
    with ExitStack() as stack:
        staged: StagedModel | None = None
        with world.raise_together("start to write"):
            if world.is_first:
                staged = stack.enter_context(StagedModel(out, specs))
        yield staged


def copy_base_tensors(
    index: SafetensorsIndex,
    left_out: Collection[str],
    writer: StagedModel,
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Copy the tensors of the base that are not in ``left_out``.

    Args:
        renamed: names in the output, where they are others.
    """
    with RowReader(index) as reader:
        for name, info in index.tensors.items():
            if name in left_out:
                continue
            rows = max(1, _COPIED_BYTES // max(1, info.row_bytes))
            for span in Span(0, info.num_rows).split_into_chunks(rows):
                writer.write_rows(renamed.get(name, name), reader.read_rows(name, span), span.start)
