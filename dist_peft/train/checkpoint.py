"""Checkpoints: adapters, optimizer moments and the position of the run; never the base.

Written through ``torch.distributed.checkpoint`` (each rank its own shards, by global position), so
that any engine at any number of ranks can read them. Layout of ``checkpoints/step-000100/``::

    .metadata, __0_0.distcp ...   param/NAME, exp_avg/NAME, exp_avg_sq/NAME in float32
    run.json                      step, samples seen, seed, fingerprint of the base, and by key the
                                  run's identity: configuration, rows, tokenizer, versions
    base.json                     hashes of the base's tensors (``app.base_content``)
    adapter.json                  metadata of an adapter made of it (``app.checkpoint_adapter``)
    chain.json                    in exact runs: a chain of hashes (``train.state_chain``)
    files.json                    size and checksum of every other file (``checkpoint_files``)

There is no random state but ``seed`` and ``step``. Data order is a function of (seed, epoch),
dropout of (seed, module, step, sample), so both resume exactly where they stopped.

A checkpoint is written under a temporary name and renamed when rank 0 has seen the shards of all
ranks. A resume verifies the checksums; a damaged checkpoint is passed over for the one before.
"""

import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial as bind
from pathlib import Path
from types import MappingProxyType

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dist_peft.core.errors import RunFailure, UserError
from dist_peft.core.log import ONCE
from dist_peft.core.progress_beat import SETUP_PATIENCE, enter_phase
from dist_peft.core.text_exchange import broadcast_text
from dist_peft.core.world import World
from dist_peft.engine.flat_shard import FlatShard
from dist_peft.store.fileio import sync_directory
from dist_peft.store.writer import write_atomically
from dist_peft.train.checkpoint_files import BestCheckpoint, parse_checkpoint_step
from dist_peft.train.checkpoint_reader import CheckpointReader, TensorLoadPlanner
from dist_peft.train.checkpoint_verify import (
    find_checkpoint_damage,
    make_unreadable_error,
    read_metadata,
)
from dist_peft.train.checkpoint_writer import (
    BackgroundWrite,
    CheckpointJob,
    StagedState,
    get_writer_group,
    write_staged_checkpoint,
)
from dist_peft.train.run_position import RunPosition, read_position

__all__ = ["CheckpointManager", "RunPosition"]

log = logging.getLogger("dist_peft")

_SHARED_ERROR_SECONDS = 600.0
"""The longest wait for a write in flight after an error that all ranks raise together."""


class CheckpointManager:
    """The checkpoints of one run directory.

    Args:
        keep: number of newest checkpoints that stay.
        asynchronous: write in a thread; a step then waits for the copy to CPU memory only.
        keep_best: also keep the checkpoint of the best evaluation.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        world: World,
        *,
        asynchronous: bool = False,
        keep_best: bool = False,
    ) -> None:
        self.directory = directory
        self.keep = keep
        self.world = world
        self.asynchronous = asynchronous
        self.keep_best = keep_best
        self.seconds_blocked = 0.0
        """Time that the last ``save_checkpoint`` took from its caller."""
        self._in_flight: BackgroundWrite | None = None

    # -- writing -------------------------------------------------------------------------------

    @enter_phase("checkpoint", SETUP_PATIENCE)
    def save_checkpoint(
        self,
        state: Mapping[str, Tensor | FlatShard],
        position: RunPosition,
        files: Mapping[str, str] = MappingProxyType({}),
        *,
        best: tuple[str, float] | None = None,
        seal: Callable[[Path], Mapping[str, str]] | None = None,
    ) -> Path:
        """Write ``state``, then remove all but the newest ``keep`` checkpoints. Collective.

        An asynchronous manager returns as soon as ``state`` is copied; the end of the write is
        that of ``finish_writing``. At most one write is in flight: an earlier one is waited for.

        Args:
            files: name -> contents of small files that belong to it.
            best: metric and its held-out value, if that is the best so far.
            seal: see ``CheckpointJob``.

        Raises:
            UserError: the disk is full or not writable (on every rank); for an asynchronous
                manager also that of the write before.
        """
        start = time.perf_counter()
        self.finish_writing()
        final = self.directory / f"step-{position.step:06d}"
        partial = self.directory / f".partial-step-{position.step:06d}"
        staged = StagedState(state, self.world.is_first)
        with self.world.raise_together("prepare checkpoint"):
            if self.world.is_first:
                _remove_checkpoint(partial)
                _make_directory(partial, need=_total_bytes(state.values()))
        publish = bind(self._publish_checkpoint, partial, final, best)
        job = CheckpointJob(partial, final, staged, position, files, publish, seal)
        if self.asynchronous:
            group = get_writer_group()
            write = bind(write_staged_checkpoint, job, self.world, group)
            self._in_flight = BackgroundWrite(write)
        else:
            write_staged_checkpoint(job, self.world, None)
        self.seconds_blocked = time.perf_counter() - start
        log.info("step %d waited %.3f s for its checkpoint", position.step, self.seconds_blocked)
        return final

    @property
    def has_failed(self) -> bool:
        """Whether the write in flight has ended with an error, which ``finish_writing`` raises."""
        return self._in_flight is not None and self._in_flight.has_failed

    @enter_phase("checkpoint", SETUP_PATIENCE)
    def finish_writing(self) -> None:
        """Wait for the write in flight. All ranks call it, and all raise its error."""
        write, self._in_flight = self._in_flight, None
        if write is not None:
            write.finish()

    @contextmanager
    def writes_finished(self) -> Iterator[None]:
        """Wait at the end of the body for the write in flight; after an error only so long as
        other ranks may be expected to take part in it."""
        try:
            yield
        except Exception as error:
            write, self._in_flight = self._in_flight, None
            if write is not None:
                is_shared = isinstance(error, UserError | RunFailure)
                write.abandon(_SHARED_ERROR_SECONDS if is_shared else 10.0)
            raise
        self.finish_writing()

    def _publish_checkpoint(
        self, partial: Path, final: Path, best: tuple[str, float] | None
    ) -> None:
        step = parse_checkpoint_step(final)
        replaced = final.with_name(f".replaced-{final.name}")
        if final.exists():
            _remove_checkpoint(replaced)
            final.rename(replaced)
        partial.rename(final)
        _remove_checkpoint(replaced)
        if best is not None:
            path = BestCheckpoint.get_path(self.directory)
            write_atomically(path, BestCheckpoint(step, *best).to_json())
        sync_directory(self.directory)
        self._set_later_aside(step)
        self._remove_older(newest=final)
        log.info("saved %s", final)

    def _set_later_aside(self, step: int) -> None:
        """Move later checkpoints of an older run away, so that this run cannot resume from them."""
        for path in self.list_published():
            if parse_checkpoint_step(path) > step:
                kept = self.directory / "superseded" / path.name
                kept.parent.mkdir(exist_ok=True)
                _remove_checkpoint(kept)
                path.rename(kept)
                log.warning("%s is of an earlier run: moved to %s", path, kept)

    def _remove_older(self, newest: Path) -> None:
        best = BestCheckpoint.read_from(self.directory) if self.keep_best else None
        for old in self.list_published()[: -self.keep]:
            if old != newest and (best is None or parse_checkpoint_step(old) != best.step):
                _remove_checkpoint(old)

    def remove_unfinished(self) -> None:
        """Remove what killed runs of this directory have left half written."""
        for path in self.directory.glob(".partial-step-*"):
            log.info("removing %s, which a killed run left unfinished", path)
            _remove_checkpoint(path)
        for path in self.directory.glob(".replaced-step-*"):
            final = path.with_name(path.name.removeprefix(".replaced-"))
            if final.exists():
                _remove_checkpoint(path)
            else:
                path.rename(final)

    # -- reading -------------------------------------------------------------------------------

    def list_published(self) -> list[Path]:
        """Return published checkpoints, oldest first; log those that never were.

        One rename publishes a checkpoint as a whole. So one that lacks files is damaged, and counts
        here: a run whose only checkpoint it is must not start over without a word.
        """
        published = []
        for path in sorted(
            self.directory.glob("*step-*"), key=lambda p: (parse_checkpoint_step(p), p.name)
        ):
            if path.name.startswith("step-"):
                published.append(path)
            else:
                log.warning("skipping incomplete checkpoint %s", path, extra=ONCE)
        return published

    def select_checkpoint(self, resume: str) -> Path | None:
        """Return the checkpoint to resume from, verified. Collective.

        Args:
            resume: ``auto``: the newest that is not damaged, if any; ``never``: none; or a path.

        Raises:
            UserError: on every rank: the path is not a complete checkpoint, or is damaged; or all
                checkpoints of the run are.
        """
        if resume == "never":
            return None
        if resume == "auto":
            return self._select_newest_intact()
        path = Path(resume)
        with self.world.raise_together("look for the checkpoint"):
            if not (path / "run.json").is_file():
                raise UserError(
                    f"resume: {path} is not a complete checkpoint; give a checkpoints/step-* "
                    "directory, auto or never"
                )
        if damage := find_checkpoint_damage(path, self.world):
            raise UserError(
                f"resume: checkpoint {path} is damaged: {damage}; restore it, name another, or "
                "give resume: auto to take the newest intact one"
            )
        return path

    def _select_newest_intact(self) -> Path | None:
        found: list[str] = []
        for path in self._share_newest_first():
            damage = find_checkpoint_damage(path, self.world)
            if damage is None:
                return path
            log.warning("passing over damaged checkpoint %s: %s", path, damage, extra=ONCE)
            found.append(f"{path.name}: {damage}")
        if found:
            raise UserError(
                f"every checkpoint in {self.directory} is damaged ({'; '.join(found)}); restore "
                "one, or start over with resume: never"
            )
        return None

    def _share_newest_first(self) -> list[Path]:
        """Return the first rank's published checkpoints on every rank, newest first."""
        names: list[str] = []
        with self.world.raise_together("look for checkpoints"):
            if self.world.is_first:
                names = [path.name for path in reversed(self.list_published())]
        shared: list[str] = json.loads(broadcast_text(json.dumps(names)))
        return [self.directory / name for name in shared]

    def find_checkpoint(self, which: str) -> Path:
        """Return the verified checkpoint ``last``, ``best`` or that of a step number. Collective.

        Raises:
            UserError: on every rank: there is none, or it is damaged.
        """
        if which == "last":
            path = self._select_newest_intact()
            if path is None:
                raise UserError(f"{self.directory} has no complete checkpoint")
            return path
        with self.world.raise_together("look for the checkpoint"):
            best = BestCheckpoint.read_from(self.directory) if which == "best" else None
            if which == "best" and best is None:
                raise UserError(
                    f"{self.directory} records no best checkpoint: it is kept where "
                    "save.keep_best is true; name a step, or last"
                )
            step = int(which) if best is None else best.step
            path = self.directory / f"step-{step:06d}"
            if not path.exists():
                steps = [str(parse_checkpoint_step(p)) for p in self.list_published()]
                raise UserError(
                    f"there is no complete checkpoint {path}; there are steps "
                    f"{', '.join(steps) or 'none'}"
                )
        if damage := find_checkpoint_damage(path, self.world):
            raise UserError(f"checkpoint {path} is damaged: {damage}; name another")
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
            read_metadata(path)  # before torch does, which would log its tracebacks
        with self.world.raise_together("read a checkpoint"):
            try:
                # each rank plans alone: nothing is exchanged, which torch would pickle
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                    dcp.load(
                        state,
                        storage_reader=CheckpointReader(path),
                        planner=TensorLoadPlanner(),
                        no_dist=True,
                    )
            except dcp.api.CheckpointException as error:
                raise make_unreadable_error(path, next(iter(error.failures.values()))[0]) from None
            except (OSError, RuntimeError, ValueError) as error:
                raise make_unreadable_error(path, error) from None

    def read_whole_tensors(self, path: Path, names: Iterable[str]) -> dict[str, Tensor]:
        """Return whole tensors by key, on every rank, without a model."""
        wanted = set(names)
        if not wanted:
            return {}
        with self.world.raise_together("read a checkpoint's metadata"):
            metadata = read_metadata(path).state_dict_metadata
        state = {
            key: torch.empty(info.size, dtype=info.properties.dtype)
            for key, info in metadata.items()
            if key in wanted and isinstance(info, TensorStorageMetadata)
        }
        if missing := wanted - set(state):
            raise UserError(f"checkpoint {path} lacks {sorted(missing)[0]}")
        self.load_checkpoint(path, state)
        return state


def _total_bytes(tensors: Iterable[Tensor | FlatShard]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _make_directory(path: Path, need: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free >= need:
            path.mkdir()
    except OSError as error:
        raise UserError(f"cannot create checkpoint directory {path}: {error.strerror}") from None
    if free < need:
        raise UserError(
            f"checkpoint {path} needs {need / 2**20:.1f} MiB but the disk has "
            f"{free / 2**20:.1f} MiB left; free space or set save.dir to another disk"
        )


def _remove_checkpoint(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()
