"""Write one checkpoint, in the step or in a thread behind it.

A write has two parts. ``StagedState`` copies this rank's shards to CPU memory; after that the
parameters may change. ``write_staged_checkpoint`` has the collectives and the files: in a thread it
needs a process group of its own, since the main thread uses the default one meanwhile.

Ranks end a write with the same outcome: rank 0 publishes after it has seen every rank's shard on
its own file system, and all learn whether it did.
"""

import json
import logging
import math
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.tensor import DTensor
from torch.futures import Future

from dist_peft.core.errors import UserError
from dist_peft.core.progress_beat import connect_to_ranks
from dist_peft.core.text_exchange import broadcast_text, gather_texts
from dist_peft.core.world import RemoteError, World
from dist_peft.engine.flat_shard import FlatShard
from dist_peft.store.fileio import sync_directory
from dist_peft.store.writer import write_atomically
from dist_peft.train.checkpoint_files import (
    RECORD_NAME,
    FileChecksum,
    format_checksum_record,
    hash_file,
    wait_for_files,
)
from dist_peft.train.checkpoint_plan import save_shards
from dist_peft.train.run_position import RunPosition

__all__ = [
    "BackgroundWrite",
    "CheckpointJob",
    "StagedState",
    "get_writer_group",
    "write_staged_checkpoint",
]

log = logging.getLogger("dist_peft")

SEEN_SECONDS = 60.0
"""The longest wait until rank 0's file system shows the other ranks' shards."""

_group: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
"""The default process group and, made from it, that of the writer threads."""


class StagedState(dcp.DefaultSavePlanner):
    """A save planner that owns CPU copies of the tensors it plans.

    Plan and copies are made at once; nothing of ``state`` is kept, so parameters may change and
    temporary tensors of a device are freed.
    """

    def __init__(self, state: Mapping[str, Tensor | FlatShard], is_coordinator: bool) -> None:
        super().__init__()
        flat = {name: value for name, value in state.items() if isinstance(value, FlatShard)}
        others = {name: value for name, value in state.items() if name not in flat}
        super().set_up_planner(others, None, is_coordinator)
        plan = super().create_local_plan()
        items = [item for name, shard in flat.items() for item in _list_box_items(name, shard)]
        self._local_plan = replace(
            plan,
            items=[*plan.items, *items],
            planner_data={**plan.planner_data, **{name: (name,) for name in flat}},
        )
        self._copies = {name: _copy_local_tensor(value) for name, value in state.items()}
        self._boxes = {
            (name, offsets): values
            for name, shard in flat.items()
            for offsets, values in _view_boxes(shard, self._copies[name])
        }
        self.state_dict = {}

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._copies.values())

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        pass  # done by the constructor, while the tensors still had the values to save

    def create_local_plan(self) -> SavePlan:
        return self._local_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        name, offset = write_item.index.fqn, write_item.index.offset
        box = None if offset is None else self._boxes.get((name, tuple(offset)))
        return self._copies[name] if box is None else box


def _list_box_items(name: str, shard: FlatShard) -> Iterator[WriteItem]:
    for offsets, sizes in shard.list_boxes():
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        properties = TensorProperties.create_from_tensor(shard.values)
        yield WriteItem(
            MetadataIndex(name, torch.Size(offsets)),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk, properties, torch.Size(shard.shape)),
        )


def _view_boxes(shard: FlatShard, values: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Yield the offsets of each box and its part of ``values``, a copy of the shard's."""
    start = 0
    for offsets, sizes in shard.list_boxes():
        stop = start + math.prod(sizes)
        yield offsets, values[start:stop].view(sizes)
        start = stop


def _copy_local_tensor(tensor: Tensor | FlatShard) -> Tensor:
    if isinstance(tensor, FlatShard):
        return tensor.values.detach().to("cpu", copy=True)
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().to("cpu", copy=True)


class _HashingWriter(dcp.FileSystemWriter):
    """A ``FileSystemWriter`` that keeps the checksums of the files that this rank has written."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.directory = directory
        self.checksums: dict[str, FileChecksum] = {}

    def write_data(self, plan: SavePlan, planner: dcp.SavePlanner) -> Future[Any]:
        written: Future[Any] = super().write_data(plan, planner)
        written.wait()
        for file in self.directory.glob(f"{plan.storage_data.prefix}*"):
            self.checksums[file.name] = hash_file(file)
        return written


@dataclass(frozen=True)
class CheckpointJob:
    """One checkpoint to write.

    Attributes:
        partial: directory to write to; the first rank has made it.
        final: directory to publish it as.
        position, files: contents of ``run.json`` and of further small files by name.
        publish: called on the first rank once the directory is complete; renames it.
        seal: called on the first rank with the directory, which has everything but its result:
            further small files by name.
    """

    partial: Path
    final: Path
    staged: StagedState
    position: RunPosition
    files: Mapping[str, str]
    publish: Callable[[], None]
    seal: Callable[[Path], Mapping[str, str]] | None = None


def write_staged_checkpoint(
    job: CheckpointJob, world: World, group: dist.ProcessGroup | None
) -> None:
    """Write the shards, let the first rank look for all of them, and publish. Collective.

    Args:
        group: process group for the exchange; None: the default one.

    Raises:
        UserError: on every rank: the disk is full or not writable, or not shared.
    """
    try:
        checksums = _write_shards(job, world, group)
        failure: Exception | None = None
        if world.is_first:
            try:
                _complete_checkpoint(job, checksums, world)
            except OSError as error:
                failure = _make_write_error(job.final, error)
            except Exception as error:
                failure = error
        _share_failure(failure, world, group)
    except BaseException:
        shutil.rmtree(job.partial, ignore_errors=True)  # on a full disk every byte counts
        raise


def _write_shards(
    job: CheckpointJob, world: World, group: dist.ProcessGroup | None
) -> list[dict[str, FileChecksum]]:
    """Write this rank's shard; return the files of every rank, by rank, on the first."""
    writer = _HashingWriter(job.partial)
    try:
        save_shards(writer, job.staged, group)
    except OSError as error:
        raise _make_write_error(job.final, error) from None
    return _gather_checksums(writer.checksums, group)


def _complete_checkpoint(
    job: CheckpointJob, checksums: list[dict[str, FileChecksum]], world: World
) -> None:
    """On the first rank: look for every shard, add the small files and the record, publish."""
    for rank, files in enumerate(checksums):
        sizes = {name: found.bytes for name, found in files.items()}
        if missing := wait_for_files(job.partial, sizes, SEEN_SECONDS):
            raise UserError(
                f"checkpoint {job.final} is not published: rank {rank} wrote {missing}, which "
                f"rank 0 on {world.host} does not see; save.dir must be one directory that all "
                "hosts share"
            )
    small = {**job.files, "run.json": json.dumps(asdict(job.position), indent=1)}
    for name, text in small.items():
        write_atomically(job.partial / name, text)
    sealed = {} if job.seal is None else job.seal(job.partial)
    for name, text in sealed.items():
        write_atomically(job.partial / name, text)
    record = {name: found for files in checksums for name, found in files.items()}
    record |= {name: hash_file(job.partial / name) for name in (*small, *sealed, ".metadata")}
    write_atomically(job.partial / RECORD_NAME, format_checksum_record(record))
    sync_directory(job.partial)
    job.publish()


def _make_write_error(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write checkpoint {path}: {error.strerror or error}; free space or choose another "
        "save.dir"
    )


def _gather_checksums(
    mine: dict[str, FileChecksum], group: dist.ProcessGroup | None
) -> list[dict[str, FileChecksum]]:
    """Return each rank's files, by rank, on the first rank; an empty list elsewhere."""
    text = json.dumps({name: asdict(found) for name, found in mine.items()})
    everyone = [json.loads(other) for other in gather_texts(text, group)]
    return [{name: FileChecksum(**f) for name, f in files.items()} for files in everyone]


def _share_failure(
    failure: Exception | None, world: World, group: dist.ProcessGroup | None
) -> None:
    """Raise the first rank's ``failure`` on every rank."""
    mine = None if failure is None else [isinstance(failure, UserError), str(failure)]
    told = json.loads(broadcast_text(json.dumps(mine), group))
    if failure is not None:
        raise failure
    if told is not None:
        is_users, text = told
        raise UserError(text) if is_users else RemoteError(f"rank 0 failed to publish: {text}")


def get_writer_group() -> dist.ProcessGroup | None:
    """Return the process group of writer threads; the first call is collective.

    None for a single process.
    """
    global _group
    if not dist.is_initialized():
        return None
    default = dist.group.WORLD
    assert default is not None
    if _group is None or _group[0] is not default:
        with connect_to_ranks():
            _group = (default, dist.new_group(backend="gloo"))
    return _group[1]


class BackgroundWrite:
    """A checkpoint that a thread writes while training continues."""

    def __init__(self, write: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        self._write = write
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._write()
        except BaseException as error:
            self._error = error

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    def finish(self) -> None:
        """Wait for the end; raises the error of the write."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def abandon(self, seconds: float) -> None:
        """Wait at most ``seconds`` and raise nothing: other ranks may be dead, and the run is
        ending with another error. An unfinished directory is not published."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.warning("the checkpoint being written is abandoned; the one before stays valid")
