"""Write a base packed, in the layout of the unquantized one.

Each linear weight of the blocks becomes packed rows::

    config.json         the base's, with quantization_config:
                        {"quant_method": "dist_peft", "kind": "int", "bits": 4, "group_size": 64,
                         "solver": "gptq", "made_from": {"base": ..., "fingerprint": ..., ...}}
    model*.safetensors  STEM.weight [out, in]  ->  STEM.packed uint8 [out, row_bytes]
                        everything else as in the base
    tokenizer, generation settings, licence: copies

``store.publish`` lets the directory appear as a whole.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from dist_peft.compress.base_writer import copy_base_tensors, open_base_writer
from dist_peft.core.config.run import BaseConfig
from dist_peft.core.world import World
from dist_peft.engine import Engine
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.hub import read_json_object
from dist_peft.model.model_files import copy_model_files
from dist_peft.model.prequantized.base import OWN_METHOD
from dist_peft.model.skeleton import Skeleton, parse_torch_dtype
from dist_peft.quant.codec import list_quant_keys
from dist_peft.store.staged_model import StagedModel
from dist_peft.store.writer import TensorSpec

__all__ = ["open_packed_writer", "write_packed_base"]


def open_packed_writer(
    skeleton: Skeleton, out: Path, world: World
) -> AbstractContextManager[StagedModel | None]:
    """Open the writer of a packed base (``base_writer.open_base_writer``).

    Args:
        skeleton: the model with its frozen linears, whose sizes the files get.
        out: final directory; nothing is written there before ``write_packed_base`` has ended.

    Raises:
        UserError: on every rank: no space or no permission.
    """
    return open_base_writer(_list_tensor_specs(skeleton), out, world)


def write_packed_base(
    base: BaseConfig,
    skeleton: Skeleton,
    engine: Engine,
    origin: Mapping[str, Any],
    world: World,
    writer: StagedModel | None,
) -> None:
    """Gather one linear at a time and write it from rank 0, then publish the directory.

    Args:
        base: the unquantized base, and the quantization of the loaded model.
        skeleton: the loaded model.
        engine: shards the packed rows of ``skeleton``.
        origin: ``made_from`` in ``config.json``.
        writer: of ``open_packed_writer``.

    Raises:
        UserError: on every rank: no space or no permission.
    """
    linears = _map_packed_linears(skeleton)
    for source, linear in linears.items():
        packed = engine.gather_parameter(linear.packed)
        with world.raise_together(f"write {source}"):
            if writer is not None:
                writer.write_rows(_make_packed_name(source), packed)
    with world.raise_together("write the rest"):
        if writer is not None:
            copy_base_tensors(skeleton.index, set(linears), writer)
            _copy_configuration(base, skeleton.index.path, writer.directory, origin)
            writer.publish()


def _map_packed_linears(skeleton: Skeleton) -> dict[str, FrozenLinear]:
    """Return the packed linears by the name of their weight in the base."""
    found = (module for module in skeleton.model.modules() if isinstance(module, FrozenLinear))
    return {module.source: module for module in found if not module.is_head}


def _make_packed_name(source: str) -> str:
    return f"{source.removesuffix('.weight')}.packed"


def _list_tensor_specs(skeleton: Skeleton) -> list[TensorSpec]:
    specs, linears = [], _map_packed_linears(skeleton)
    for name, info in skeleton.index.tensors.items():
        if name in linears:
            shape = tuple(linears[name].packed.shape)
            specs.append(TensorSpec(_make_packed_name(name), torch.uint8, shape))
        else:
            specs.append(TensorSpec(name, info.dtype, info.shape))
    return specs


def _copy_configuration(
    base: BaseConfig, directory: Path, out: Path, origin: Mapping[str, Any]
) -> None:
    """Copy all files without weights; add the quantization to ``config.json``."""
    quant = base.quant
    assert quant is not None
    known = read_json_object(directory / "config.json")
    named = known.get("dtype") or known.get("torch_dtype")
    dtype = parse_torch_dtype(named if isinstance(named, str) else base.compute_dtype)
    about = {key: getattr(quant, key) for key in list_quant_keys(quant.kind)}
    about["solver"] = quant.solver
    settings = {"quant_method": OWN_METHOD, **about, "made_from": dict(origin)}
    changes = {"quantization_config": settings}
    copy_model_files(directory, out, dtype, changes, code=base.trust_remote_code)
