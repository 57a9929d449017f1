"""Write a pruned base: an ordinary Hugging Face directory in the types of the base.

Either all tensors, the pruned ones with their zeros, or the tensors of the blocks that stay, under
their new numbers::

    model.layers.0  .1  .2  .3  .4          block 1 and 2 dropped
    model.layers.0          .1  .2          num_hidden_layers 5 -> 3; layer_types and the like cut

``config.json`` says under ``pruning`` how the directory was made. The directory is renamed to its
final name when it is complete.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_peft.compress.base_writer import copy_base_tensors, open_base_writer
from dist_peft.compress.prune_driver import list_pruned_linears
from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.engine import Engine
from dist_peft.model.hub import read_json_object
from dist_peft.model.model_files import copy_model_files
from dist_peft.model.skeleton import Skeleton, build_skeleton, parse_torch_dtype
from dist_peft.store.staged_model import StagedModel
from dist_peft.store.writer import TensorSpec

__all__ = [
    "check_blocks_removable",
    "open_pruned_writer",
    "write_fewer_blocks",
    "write_pruned_base",
]

_OWN_NUMBERS = ("layer_idx", "layer_id", "layer_number", "block_idx", "source")
"""Attributes of a block's modules that hold its number."""


def open_pruned_writer(
    skeleton: Skeleton, out: Path, world: World
) -> AbstractContextManager[StagedModel | None]:
    """Open the writer of a base with the same tensors (``base_writer.open_base_writer``).

    Raises:
        UserError: on every rank: no space or no permission.
    """
    tensors = skeleton.index.tensors.values()
    specs = [TensorSpec(info.name, info.dtype, info.shape) for info in tensors]
    return open_base_writer(specs, out, world)


def write_pruned_base(
    base: BaseConfig,
    skeleton: Skeleton,
    engine: Engine,
    pruning: Mapping[str, Any],
    world: World,
    writer: StagedModel | None,
) -> None:
    """Gather one linear at a time and write it from rank 0, then publish the directory.

    Args:
        skeleton: the loaded model, its linears pruned and in the files' types.
        engine: shards the rows of ``skeleton``.
        pruning: value of that key in ``config.json``.
        writer: of ``open_pruned_writer``.

    Raises:
        UserError: on every rank: no space or no permission.
    """
    linears = list_pruned_linears(skeleton.model)
    for linear in linears:
        packed = engine.gather_parameter(linear.packed)
        with world.raise_together(f"write {linear.source}"):
            if writer is not None:
                dtype = skeleton.index.find_tensor(linear.source).dtype
                rows = linear.codec.dequantize_rows(packed, linear.in_features, dtype)
                writer.write_rows(linear.source, rows)
    with world.raise_together("write the rest"):
        if writer is not None:
            copy_base_tensors(skeleton.index, {linear.source for linear in linears}, writer)
            _copy_configuration(base, skeleton, writer.directory, {"pruning": dict(pruning)})
            writer.publish()


# -- fewer blocks --------------------------------------------------------------------------------


def check_blocks_removable(skeleton: Skeleton) -> None:
    """Check that the model's configuration and files number its blocks.

    Raises:
        UserError: they do not.
    """
    config, count = skeleton.model_config, len(skeleton.blocks)
    key = _get_count_key(skeleton)
    if read_json_object(skeleton.index.path / "config.json").get(key) != count:
        raise UserError(
            f"{skeleton.index.path / 'config.json'} of type {config.model_type!r} does not say "
            f"{key}: {count}, the number of blocks, so that none can be dropped; prune weights "
            "(--method wanda) instead"
        )
    _find_number_place(skeleton)


def write_fewer_blocks(
    base: BaseConfig,
    skeleton: Skeleton,
    kept: Sequence[int],
    pruning: Mapping[str, Any],
    out: Path,
    world: World,
) -> None:
    """Write the base with the blocks ``kept`` alone, then rename the directory to ``out``.

    Args:
        kept: numbers of the blocks, ascending.
        pruning: value of that key in ``config.json``.
        out: absent or an empty directory.

    Raises:
        UserError: on every rank: no space or no permission, or the model with fewer blocks computes
            a block in another way.
    """
    renamed, dropped = _renumber_tensors(skeleton, kept)
    specs = [
        TensorSpec(renamed.get(name, name), info.dtype, info.shape)
        for name, info in skeleton.index.tensors.items()
        if name not in dropped
    ]
    with open_base_writer(specs, out, world) as writer, world.raise_together("write the blocks"):
        if writer is not None:
            copy_base_tensors(skeleton.index, dropped, writer, renamed)
            writer.close_files()
            changes = _cut_layer_settings(skeleton, kept)
            _copy_configuration(
                base, skeleton, writer.directory, {**changes, "pruning": dict(pruning)}
            )
            _check_blocks_alike(base, skeleton, kept, writer.directory)
            writer.publish()


def _get_count_key(skeleton: Skeleton) -> str:
    """Return the key of ``config.json`` that has the number of blocks."""
    config = skeleton.model_config
    return str(config.attribute_map.get("num_hidden_layers", "num_hidden_layers"))


def _find_number_place(skeleton: Skeleton) -> tuple[str, ...]:
    """Return the parts of the tensors' names before the number of a block.

    Raises:
        UserError: names of a block's tensors do not have its number at one place.
    """
    found: set[tuple[str, ...] | None] = set()
    for number, block in enumerate(skeleton.blocks):
        for module in block.modules():
            names: dict[str, str] = getattr(module, "checkpoint_names", {})
            for name in names.values():
                parts = tuple(name.split("."))
                place = parts.index(str(number)) if str(number) in parts else None
                found.add(None if place is None else parts[:place])
    (prefix, *others) = found or {None}
    if prefix is None or others:
        raise UserError(
            f"the tensors of {skeleton.index.path} do not have the number of their block in their "
            "names, so that none can be dropped; prune weights (--method wanda) instead"
        )
    return prefix


def _renumber_tensors(skeleton: Skeleton, kept: Sequence[int]) -> tuple[dict[str, str], set[str]]:
    """Return new names of tensors in the blocks ``kept``, and the names of those in others."""
    prefix = _find_number_place(skeleton)
    numbers = {str(old): str(new) for new, old in enumerate(kept)}
    renamed, dropped = dict[str, str](), set[str]()
    for name in skeleton.index.tensors:
        parts = name.split(".")
        place = len(prefix)
        if tuple(parts[:place]) != prefix or len(parts) <= place or not parts[place].isdigit():
            continue
        if parts[place] in numbers:
            parts[place] = numbers[parts[place]]
            renamed[name] = ".".join(parts)
        else:
            dropped.add(name)
    return renamed, dropped


def _cut_layer_settings(skeleton: Skeleton, kept: Sequence[int]) -> dict[str, Any]:
    """Return keys of ``config.json``: the number of blocks, and lists with an entry for each."""
    count = len(skeleton.blocks)
    changes: dict[str, Any] = {_get_count_key(skeleton): len(kept)}
    for key, value in skeleton.model_config.to_dict().items():
        if "layer" in key and isinstance(value, list) and len(value) == count:
            changes[key] = [value[number] for number in kept]
    return changes


def _check_blocks_alike(
    base: BaseConfig, skeleton: Skeleton, kept: Sequence[int], directory: Path
) -> None:
    """Build the written model without weights and compare its blocks with those of the base."""
    written = build_skeleton(base, directory)
    whole = build_skeleton(base, skeleton.index.path)  # engines have changed the loaded one
    for new, old in enumerate(kept):
        if _describe_block(written.blocks[new]) != _describe_block(whole.blocks[old]):
            raise UserError(
                f"block {old} of {skeleton.index.path} computes in another way as block {new} of a "
                f"model with {len(kept)} blocks: {skeleton.model_config.model_type!r} derives "
                "settings from a block's number; prune weights (--method wanda) instead"
            )


def _describe_block(block: nn.Module) -> list[tuple[str, str, dict[str, Any]]]:
    """Return path, class and plain attributes of each module, without its number."""
    return [
        (path, type(module).__name__, {k: v for k, v in vars(module).items() if _is_setting(k, v)})
        for path, module in block.named_modules()
    ]


def _is_setting(key: str, value: object) -> bool:
    plain = value is None or isinstance(value, bool | int | float | str | torch.dtype)
    return plain and key not in _OWN_NUMBERS


def _copy_configuration(
    base: BaseConfig, skeleton: Skeleton, out: Path, changes: Mapping[str, Any]
) -> None:
    """Copy all files without weights; change ``config.json``."""
    directory = skeleton.index.path
    known = read_json_object(directory / "config.json")
    named = known.get("dtype") or known.get("torch_dtype")
    sources = [skeleton.index.find_tensor(m.source) for m in list_pruned_linears(skeleton.model)]
    stored = sources[0].dtype if sources else parse_torch_dtype(base.compute_dtype)
    dtype = parse_torch_dtype(named) if isinstance(named, str) else stored
    copy_model_files(directory, out, dtype, changes, code=base.trust_remote_code)
