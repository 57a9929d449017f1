"""Checkpoints: adapters, optimizer moments and the position of the run; never the base.

Written through ``torch.distributed.checkpoint`` (each rank its own shards, by global position), so
that any engine at any number of ranks can read them. Layout of ``checkpoints/step-000100/``::

    .metadata, __0_0.distcp ...   param/NAME, exp_avg/NAME, exp_avg_sq/NAME in float32
    run.json                      step, samples seen, seed, fingerprint of the base, and by key the
    run's identity: configuration, rows, tokenizer, versions base.json                     hashes of
    the base's tensors (``app.base_content``)

There is no random state but ``seed`` and ``step``. Data order is a function of (seed, epoch),
dropout of (seed, module, step, sample), so both resume exactly where they stopped.

A checkpoint is written under a temporary name and renamed when it is complete on all ranks; a
directory without a final name or a readable ``run.json`` is skipped and named in the log.
"""

import json
import logging
import pickle
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.core.world import World
from dist_peft.store.writer import write_atomically
from dist_peft.train.checkpoint_reader import CheckpointReader, TensorLoadPlanner
from dist_peft.train.run_position import RunPosition, read_position

__all__ = ["CheckpointManager", "RunPosition"]

log = logging.getLogger("dist_peft")

_UNREADABLE = (OSError, pickle.UnpicklingError, EOFError, ValueError, LookupError, AttributeError)
"""Exceptions raised on reading a damaged ``.metadata``."""


class CheckpointManager:
    """The checkpoints of one run directory."""

    def __init__(self, directory: Path, keep: int, world: World) -> None:
        self.directory = directory
        self.keep = keep
        self.world = world

    # -- writing -------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        state: Mapping[str, Tensor],
        position: RunPosition,
        files: Mapping[str, str] = MappingProxyType({}),
    ) -> Path:
        """Write ``state`` atomically, then remove all but the newest ``keep`` checkpoints.

        Args:
            files: name -> contents of small files that belong to it.

        Raises:
            UserError: the disk is full or not writable (on every rank).
        """
        final = self.directory / f"step-{position.step:06d}"
        partial = self.directory / f".partial-step-{position.step:06d}"
        with self.world.raise_together("prepare checkpoint"):
            if self.world.is_first:
                _remove_checkpoint(partial)
                _make_directory(partial, need=_total_bytes(state.values()))
        try:
            with _silence_single_process_warning():
                dcp.save(
                    dict(state),
                    storage_writer=dcp.FileSystemWriter(partial),
                    **self._cpu_process_group(),
                )
        except dcp.api.CheckpointException as error:
            if self.world.is_first:
                shutil.rmtree(partial, ignore_errors=True)  # on a full disk every byte counts
            reason = next(iter(error.failures.values()))[0]
            if isinstance(reason, OSError):
                raise UserError(
                    f"cannot write checkpoint {final}: {reason}; free space or choose another "
                    "save.dir"
                ) from None
            raise
        with self.world.raise_together("finish checkpoint"):
            if self.world.is_first:
                for name, text in files.items():
                    write_atomically(partial / name, text)
                write_atomically(partial / "run.json", json.dumps(asdict(position), indent=1))
                _remove_checkpoint(final)
                partial.rename(final)
                self._set_later_aside(position.step)
                self._remove_older(newest=final)
        return final

    def _set_later_aside(self, step: int) -> None:
        """Move later checkpoints of an older run away, so that this run cannot resume from them."""
        for path in self.list_complete():
            if _step_of_path(path) > step:
                kept = self.directory / "superseded" / path.name
                kept.parent.mkdir(exist_ok=True)
                _remove_checkpoint(kept)
                path.rename(kept)
                log.warning("%s is of an earlier run: moved to %s", path, kept)

    def _remove_older(self, newest: Path) -> None:
        for old in self.list_complete()[: -self.keep]:
            if old != newest:
                _remove_checkpoint(old)

    def _cpu_process_group(self) -> dict[str, object]:
        return {} if dist.is_initialized() else {"no_dist": True}

    # -- reading -------------------------------------------------------------------------------

    def list_complete(self) -> list[Path]:
        """Return complete checkpoints, oldest first; log incomplete ones."""
        complete = []
        for path in sorted(
            self.directory.glob("*step-*"), key=lambda p: (_step_of_path(p), p.name)
        ):
            if path.name.startswith("step-") and (path / "run.json").is_file():
                complete.append(path)
            else:
                log.warning("skipping incomplete checkpoint %s", path, extra=ONCE)
        return complete

    def select_checkpoint(self, resume: str) -> Path | None:
        """Return the checkpoint to resume from: ``auto``: newest, if any; ``never``: none; or a
        path.

        Raises:
            UserError: the path is not a complete checkpoint.
        """
        if resume == "never":
            return None
        if resume == "auto":
            return next(reversed(self.list_complete()), None)
        path = Path(resume)
        if not (path / "run.json").is_file():
            raise UserError(
                f"resume: {path} is not a complete checkpoint; give a checkpoints/step-* "
                "directory, auto or never"
            )
        return path

    @staticmethod
    def read_position(path: Path) -> RunPosition:
        """Return the position stored in the checkpoint ``path``; see
        ``run_position.read_position``."""
        return read_position(path)

    def load_checkpoint(self, path: Path, state: dict[str, Tensor]) -> None:
        """Load a checkpoint into the tensors of ``state``, in place.

        Raises:
            UserError: files are missing or damaged, or tensors do not fit (on every rank).
        """
        with self.world.raise_together("read a checkpoint's metadata"):
            _read_metadata(path)  # before torch does, which would log its tracebacks
        try:
            with _silence_single_process_warning():
                dcp.load(
                    state,
                    storage_reader=CheckpointReader(path),
                    planner=TensorLoadPlanner(),
                    **self._cpu_process_group(),
                )
        except dcp.api.CheckpointException as error:
            raise _unreadable_checkpoint_error(
                path, next(iter(error.failures.values()))[0]
            ) from None
        except (OSError, RuntimeError, ValueError) as error:
            raise _unreadable_checkpoint_error(path, error) from None

    def read_whole_tensors(self, path: Path, names: Iterable[str]) -> dict[str, Tensor]:
        """Return whole tensors by key, on every rank, without a model."""
        wanted = set(names)
        if not wanted:
            return {}
        with self.world.raise_together("read a checkpoint's metadata"):
            metadata = _read_metadata(path).state_dict_metadata
        state = {
            key: torch.empty(info.size, dtype=info.properties.dtype)
            for key, info in metadata.items()
            if key in wanted and isinstance(info, TensorStorageMetadata)
        }
        if missing := wanted - set(state):
            raise UserError(f"checkpoint {path} lacks {sorted(missing)[0]}")
        self.load_checkpoint(path, state)
        return state


@contextmanager
def _silence_single_process_warning() -> Iterator[None]:
    """Suppress torch's warning that the process group of a single process is not initialized."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _read_metadata(path: Path) -> Metadata:
    try:
        return CheckpointReader(path).read_metadata()
    except UserError:
        raise
    except _UNREADABLE as error:
        raise _unreadable_checkpoint_error(path, error) from None


def _unreadable_checkpoint_error(path: Path, error: BaseException) -> UserError:
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return UserError(
        f"cannot read checkpoint {path}: {first}; if files are damaged, remove it to resume from "
        "the one before"
    )


def _step_of_path(path: Path) -> int:
    """Return the step at the end of a checkpoint's name; 0 for a name without one."""
    digits = path.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0


def _total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _make_directory(path: Path, need: int) -> None:
    try:
        path.mkdir(parents=True)
        free = shutil.disk_usage(path).free
    except OSError as error:
        raise UserError(f"cannot create checkpoint directory {path}: {error.strerror}") from None
    if free < need:
        raise UserError(
            f"checkpoint {path} needs {need / 2**20:.1f} MiB but the disk has "
            f"{free / 2**20:.1f} MiB left; free space or set save.dir to another disk"
        )


def _remove_checkpoint(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
