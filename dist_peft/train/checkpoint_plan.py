"""The exchange of a checkpoint's plan between ranks, as JSON.

``dcp.save`` gathers each rank's plan on rank 0, removes shards that several ranks have, and
scatters the rest; then it gathers where everything lies, for ``.metadata``. It
pickles all of that. The same planner and writer are called here, and JSON goes between::

    rank                    rank 0                                      rank
    plan  -- items -->  planner.create_global_plan  -- numbers -->  its part of its own plan
    results  -- places -->  writer.finish (.metadata)

An item is ``[name, offsets or null, type, chunk offsets, chunk sizes, tensor size, dtype]``; a
rank gets back the numbers of its own items to write, each with its index among the chunks of
its tensor.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from dist_peft.core.text_exchange import all_gather_texts, gather_texts, scatter_texts
from dist_peft.core.world import RemoteError

__all__ = ["RemoteShardError", "save_shards"]

Group = dist.ProcessGroup | None


class RemoteShardError(OSError):
    """Another rank could not plan or write its shard; the text is that rank's."""


def save_shards(writer: dcp.FileSystemWriter, planner: dcp.SavePlanner, group: Group) -> None:
    """Write the shards that ``planner`` has staged, and ``.metadata``. Collective over ``group``.

    Raises:
        RemoteShardError, OSError: on every rank: one could not write.
        RemoteError: another rank failed in another way.
    """
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    plan = _run_together(lambda: _plan_locally(writer, planner, rank == 0), group)
    texts = gather_texts(json.dumps(list(map(_encode_item, plan.items))), group)
    metadata: Metadata | None = None

    def plan_globally() -> list[str]:
        nonlocal metadata
        if rank != 0:
            return []
        plans = [_decode_plan(text) for text in texts]
        chosen, metadata = planner.create_global_plan(plans)
        return [_encode_choice(p, c) for p, c in zip(plans, chosen, strict=True)]

    choice = scatter_texts(_run_together(plan_globally, group), group)
    mine = _apply_choice(plan, json.loads(choice))
    # the prefix of a rank's files is its place in the list
    prepared = writer.prepare_global_plan([SavePlan([])] * rank + [mine])[rank]
    planner.finish_plan(prepared)
    results = _run_together(lambda: _write_data(writer, prepared, planner), group)
    places = gather_texts(json.dumps(list(map(_encode_result, results))), group)

    def finish() -> None:
        if metadata is not None:
            found = [list(map(_decode_result, json.loads(text))) for text in places]
            writer.finish(metadata, found)

    _run_together(finish, group)


def _plan_locally(
    writer: dcp.FileSystemWriter, planner: dcp.SavePlanner, is_first: bool
) -> SavePlan:
    planner.set_up_planner({}, writer.storage_meta(), is_first)
    writer.set_up_storage_writer(is_first)
    return writer.prepare_local_plan(planner.create_local_plan())


def _write_data(
    writer: dcp.FileSystemWriter, plan: SavePlan, planner: dcp.SavePlanner
) -> list[WriteResult]:
    written = writer.write_data(plan, planner)
    written.wait()
    results: list[WriteResult] = written.value()
    return results


def _run_together(action: Callable[[], Any], group: Group) -> Any:
    """Call ``action`` on every rank of ``group``; if it fails on one, raise on all."""
    failure: Exception | None = None
    value = None
    try:
        value = action()
    except Exception as error:
        failure = error
    everyone = all_gather_texts("" if failure is None else _encode_failure(failure), group)
    if failure is not None:
        raise failure
    for number, text in enumerate(everyone):
        if text:
            is_system, message = json.loads(text)
            if is_system:
                raise RemoteShardError(0, message)
            raise RemoteError(f"rank {number} failed to write a checkpoint: {message}")
    return value


def _encode_failure(failure: Exception) -> str:
    is_system = isinstance(failure, OSError)
    return json.dumps([is_system, getattr(failure, "strerror", None) or str(failure)])


# -- JSON --------------------------------------------------------------------------------------


def _encode_item(item: WriteItem) -> list[Any]:
    data = item.tensor_data
    assert data is not None  # a state has tensors only
    index = item.index
    return [
        index.fqn,
        None if index.offset is None else list(index.offset),
        index.index,
        item.type.name,
        list(data.chunk.offsets),
        list(data.chunk.sizes),
        list(data.size),
        str(data.properties.dtype).removeprefix("torch."),
    ]


def _decode_item(parts: list[Any]) -> WriteItem:
    name, offset, number, kind, offsets, sizes, size, dtype = parts
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{dtype} is no type of a tensor")
    return WriteItem(
        index=_make_index(name, offset, number),
        type=WriteItemType[kind],
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
            properties=TensorProperties(dtype=found),
            size=torch.Size(size),
        ),
    )


def _make_index(name: str, offset: list[int] | None, number: int | None) -> MetadataIndex:
    return MetadataIndex(name, None if offset is None else torch.Size(offset), number)


def _decode_plan(text: str) -> SavePlan:
    items = [_decode_item(parts) for parts in json.loads(text)]
    # where the entries of a flat dict of tensors lie in it
    return SavePlan(items, planner_data={item.index.fqn: (item.index.fqn,) for item in items})


def _encode_choice(plan: SavePlan, chosen: SavePlan) -> str:
    """Return the numbers of the items of ``plan`` that are ``chosen``, each with its new index."""
    numbers = {_get_key(item): number for number, item in enumerate(plan.items)}
    return json.dumps([[numbers[_get_key(item)], item.index.index] for item in chosen.items])


def _apply_choice(plan: SavePlan, choice: list[list[Any]]) -> SavePlan:
    items = []
    for number, index in choice:
        item = plan.items[number]
        items.append(replace(item, index=replace(item.index, index=index)))
    return replace(plan, items=items)


def _get_key(item: WriteItem) -> tuple[str, Any]:
    return item.index.fqn, item.index.offset


def _encode_result(result: WriteResult) -> list[Any]:
    index, place = result.index, result.storage_data
    offset = None if index.offset is None else list(index.offset)
    where = [place.relative_path, place.offset, place.length]
    return [index.fqn, offset, index.index, result.size_in_bytes, *where]


def _decode_result(parts: list[Any]) -> WriteResult:
    name, offset, number, size, path, start, length = parts
    return WriteResult(_make_index(name, offset, number), size, _StorageInfo(path, start, length))
