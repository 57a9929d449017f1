"""Verify a checkpoint before anything is loaded from it.

Each rank reads and hashes a part of the files, so that a checkpoint is read once, not once a rank.
"""

import json
import logging
import pickle
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata

from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.core.text_exchange import all_gather_texts
from dist_peft.core.world import World
from dist_peft.train.checkpoint_files import (
    DamagedCheckpointError,
    find_damaged_file,
    read_checksum_record,
)
from dist_peft.train.checkpoint_reader import CheckpointReader
from dist_peft.train.run_position import read_position

__all__ = ["find_checkpoint_damage", "make_unreadable_error", "read_metadata"]

log = logging.getLogger("dist_peft")

_UNREADABLE = (
    OSError,
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    RecursionError,
)
"""Exceptions raised on reading a damaged ``.metadata``."""

_FIRST_WITH_RECORD = 3
"""Format of ``run.json`` from which on a checkpoint has ``files.json``."""


def find_checkpoint_damage(path: Path, world: World) -> str | None:
    """Return the reason why checkpoint ``path`` cannot be read; None if it is intact. Collective.

    Of a checkpoint without checksums, which an earlier version wrote, sizes alone are compared.

    Raises:
        UserError: on every rank: it is of a later version, or reading it could run code.
    """
    damage: str | None = None
    with world.raise_together("verify a checkpoint"):
        try:
            damage = _find_damage_of_share(path, world.rank, world.size)
        except DamagedCheckpointError as error:
            damage = error.reason
    if world.size == 1:
        return damage
    everyone = [json.loads(text) for text in all_gather_texts(json.dumps(damage))]
    return next((found for found in everyone if found is not None), None)


def _find_damage_of_share(path: Path, rank: int, size: int) -> str | None:
    """Check the position, the record and every ``size``-th file, beginning with number ``rank``."""
    if not path.is_dir():
        return "it is no directory" if path.exists() else f"rank {rank} does not see it"
    files = read_checksum_record(path)
    if files is not None:
        if absent := {"run.json", ".metadata"} - files.keys():
            return f"files.json does not name {sorted(absent)[0]}"
        # run.json on every rank, since each reads it: a damaged one may look like a later format
        if damage := find_damaged_file(path, files, ["run.json", *sorted(files)[rank::size]]):
            return damage
    position = read_position(path)
    if files is None and position.format >= _FIRST_WITH_RECORD:
        return "files.json is missing"
    if files is None:
        log.info("%s was written without checksums: sizes alone are compared", path, extra=ONCE)
    if rank == 0:
        metadata = read_metadata(path)
        named = {stored.relative_path for stored in metadata.storage_data.values()}
        if files is not None and (unknown := named - files.keys()):
            return f"files.json does not name {sorted(unknown)[0]}"
    return None


def read_metadata(path: Path) -> Metadata:
    """Return the checked ``.metadata`` of checkpoint ``path``.

    Raises:
        DamagedCheckpointError: it cannot be read, or files are missing or truncated.
        UserError: reading the checkpoint could run code.
    """
    try:
        return CheckpointReader(path).read_metadata()
    except UserError:
        raise
    except _UNREADABLE as error:
        raise make_unreadable_error(path, error) from None


def make_unreadable_error(path: Path, error: BaseException) -> DamagedCheckpointError:
    """Return the error to raise for checkpoint ``path`` on which torch's reader failed."""
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return DamagedCheckpointError(
        f"cannot read checkpoint {path}: {first}; if files are damaged, remove it to resume from "
        "the one before",
        reason=first,
    )
