"""Files of a checkpoint directory: sizes and checksums, damage, and the best of a run.

``files.json`` is a checkpoint's own record of its files, written last::

    {"format": 1, "files": {".metadata": {"bytes": 1423, "xxh3_128": "5d..."}, "run.json": ...}}

Each rank hashes the shard that it wrote, so reading back what is stored proves that it is what
was written. A checksum finds damage; it is no signature and keeps no forger away.
"""

import json
import stat
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from dist_peft.core.errors import UserError

__all__ = [
    "RECORD_NAME",
    "BestCheckpoint",
    "DamagedCheckpointError",
    "FileChecksum",
    "check_regular_file",
    "find_damaged_file",
    "format_checksum_record",
    "hash_file",
    "parse_checkpoint_step",
    "read_checksum_record",
    "wait_for_files",
]

RECORD_NAME = "files.json"

_BLOCK_BYTES = 4 * 2**20
_BEST_NAME = "best.json"


class DamagedCheckpointError(UserError):
    """A checkpoint whose files are missing, truncated or changed.

    ``reason`` is the damage without the name of the checkpoint.
    """

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason or message


@dataclass(frozen=True)
class FileChecksum:
    """Size and XXH3-128 (hexadecimal) of a file."""

    bytes: int
    xxh3_128: str


def hash_file(path: Path) -> FileChecksum:
    """Read ``path`` and return its size and hash.

    Raises:
        OSError: it cannot be read.
    """
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return FileChecksum(size, digest.hexdigest())


def check_regular_file(path: Path) -> int:
    """Return the size in bytes of a regular file. A link could read other files; a FIFO would
    block.

    Raises:
        UserError: it is a symbolic link, a directory, a FIFO or a device.
        OSError: it does not exist.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a regular file"
        raise UserError(f"{path} is {kind}, which no checkpoint of this program holds")
    return status.st_size


# -- record ------------------------------------------------------------------------------------


def format_checksum_record(files: Mapping[str, FileChecksum]) -> str:
    """Return the text of ``files.json``."""
    tree = {"format": 1, "files": {name: asdict(files[name]) for name in sorted(files)}}
    return json.dumps(tree, indent=1)


def read_checksum_record(path: Path) -> dict[str, FileChecksum] | None:
    """Return the checksums of checkpoint ``path`` by file name; None if it has no record.

    Raises:
        DamagedCheckpointError: the record is not as it was written.
    """
    file = path / RECORD_NAME
    try:
        check_regular_file(file)
        text = file.read_text(encoding="utf-8")
        files = {n: FileChecksum(**f) for n, f in json.loads(text)["files"].items()}
        if not all(type(own.bytes) is int for own in files.values()):
            raise ValueError("a size is no whole number")
        is_canonical = format_checksum_record(files) == text
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{RECORD_NAME} cannot be read: {error}") from None
    if not is_canonical or any("/" in name or name in ("", ".", "..") for name in files):
        raise DamagedCheckpointError(f"{RECORD_NAME} is not as it was written")
    return files


def find_damaged_file(
    path: Path, files: Mapping[str, FileChecksum], names: Collection[str]
) -> str | None:
    """Compare files of checkpoint ``path`` with its record; return the first difference.

    Args:
        path: a checkpoint.
        files: its record.
        names: the files to read.

    Raises:
        UserError: a file is a link or another special file.
    """
    for name in names:
        wanted = files[name]
        try:
            size = check_regular_file(path / name)
            if size != wanted.bytes:
                return f"{name} has {size:,} bytes, not {wanted.bytes:,}"
            if hash_file(path / name) != wanted:
                return f"the checksum of {name} is not that of the file that was written"
        except OSError as error:
            return f"{name}: {error.strerror or error}"
    return None


def wait_for_files(path: Path, sizes: Mapping[str, int], seconds: float) -> str | None:
    """Wait until directory ``path`` shows files of these sizes; return the first that it lacks.

    A network file system may show a file of another host some seconds late.
    """
    end = time.monotonic() + seconds
    pause = 0.001
    while True:
        missing = next((name for name, size in sizes.items() if _size(path / name) != size), None)
        if missing is None or time.monotonic() > end:
            return missing
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def parse_checkpoint_step(path: Path) -> int:
    """Return the step at the end of a checkpoint's name; 0 for a name without one."""
    digits = path.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0


# -- best --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BestCheckpoint:
    """``best.json`` of a directory of checkpoints: the one of the best evaluation.

    Attributes:
        metric: that was compared (``train.metric_for_best``).
        value: its value after the step.
    """

    step: int
    metric: str
    value: float

    @classmethod
    def read_from(cls, directory: Path) -> "BestCheckpoint | None":
        """Return the best checkpoint of ``directory``; None if none is recorded.

        Raises:
            UserError: ``best.json`` is damaged.
        """
        file = directory / _BEST_NAME
        try:
            tree: Any = json.loads(file.read_text(encoding="utf-8"))
            return cls(int(tree["step"]), str(tree["metric"]), float(tree["value"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(
                f"{file} is damaged ({error}); remove it, and name a step instead of best"
            ) from None

    def to_json(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @staticmethod
    def get_path(directory: Path) -> Path:
        return directory / _BEST_NAME
