"""A base's directory without its weights: headers with the right shapes over files of holes.

``config.json`` alone says which tensors a base has. Files whose headers list them and whose data is
one hole (a sparse file takes no room on disk) can be opened, indexed and read like the real ones;
every number in them is zero, but for the shapes that compressed-tensors keeps as tensors.

A ``config.json`` of a base in FP8, MXFP4 or compressed-tensors' integers (``model.prequantized``)
gives the tensors of that format, under the names of the published files: a tensor for each expert.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.quantizers_utils import should_convert_module

from dist_peft.core.errors import UserError
from dist_peft.model.classifier import MODELS
from dist_peft.model.decoder_blocks import find_decoder_blocks
from dist_peft.model.expert_kinds import describe_experts
from dist_peft.model.hub import REFUSALS, format_library_error
from dist_peft.quant.mxfp4 import MXFP4_GROUP
from dist_peft.store.format import TensorSpec, build_header
from dist_peft.store.index import INDEX_NAME

__all__ = ["list_base_tensors", "write_sparse_base"]


@dataclass(frozen=True)
class _ShapeSpec(TensorSpec):
    """An int64 tensor of two values: the shape of a weight."""

    weight: tuple[int, ...]


def list_base_tensors(
    config_file: Path, dtype: torch.dtype = torch.bfloat16, head: str = "lm"
) -> list[TensorSpec]:
    """Return the tensors of the model that ``config_file`` describes, by its own names.

    Tied weights are listed once, stacked experts as ``transformers`` stacks them.

    Args:
        head: ``base.head``. Of a classifier the trunk's tensors: files of a base have no others
            that it reads.

    Raises:
        UserError: ``transformers`` cannot build such a model from the file.
    """
    settings: Any = None
    try:
        config: Any = AutoConfig.from_pretrained(config_file)
        if hasattr(config, "quantization_config"):
            settings = config.quantization_config
            del config.quantization_config
        with torch.device("meta"):
            model: Any = MODELS[head].from_config(config, dtype=dtype)
    except REFUSALS as error:
        raise UserError(f"cannot use {config_file}: {format_library_error(error)}") from None
    seen: set[int] = set()
    specs = []
    prefix = f"{model.base_model_prefix}." if head == "classifier" else ""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and name.startswith(prefix):
            seen.add(id(tensor))
            kept = dtype if tensor.dtype.is_floating_point else tensor.dtype
            specs.append(TensorSpec(name, kept, tuple(tensor.shape)))
    found: Mapping[str, Any] = settings if isinstance(settings, dict) else {}
    if found.get("quant_method") == "mxfp4":
        return _list_mxfp4_tensors(model, specs)
    if found.get("quant_method") == "fp8" and found.get("weight_block_size"):
        return _list_fp8_tensors(model, specs, found)
    if found.get("quant_method") == "compressed-tensors":
        if found.get("format") == "pack-quantized":
            return _list_integer_tensors(model, specs, found)
        raise UserError(f"{config_file}: the shapes of {found.get('format')!r} files are not known")
    return specs


def _list_mxfp4_tensors(model: nn.Module, specs: list[TensorSpec]) -> list[TensorSpec]:
    """Put blocks and exponents in the place of experts that are stored transposed."""
    turned = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if (kind := describe_experts(module)) and name in kind.transposed and parameter.dim() == 3
    }
    packed: list[TensorSpec] = []
    for spec in specs:
        if spec.name not in turned:
            packed.append(spec)
            continue
        experts, columns, rows = spec.shape
        shape = (experts, rows, columns // MXFP4_GROUP)
        blocks = (*shape, MXFP4_GROUP // 2)
        packed.append(TensorSpec(f"{spec.name}_blocks", torch.uint8, blocks))
        packed.append(TensorSpec(f"{spec.name}_scales", torch.uint8, shape))
    return packed


def _list_fp8_tensors(
    model: PreTrainedModel, specs: list[TensorSpec], settings: Mapping[str, Any]
) -> list[TensorSpec]:
    """Put FP8 weights and scales of tiles in the place of the blocks' linears and experts."""
    rows, columns = (int(size) for size in settings["weight_block_size"])
    left = settings.get("modules_to_not_convert") or settings.get("ignored_layers") or []
    listed: list[TensorSpec] = []
    for spec, is_packed in _list_named_as_in_files(model, specs, left):
        listed.append(
            TensorSpec(spec.name, torch.float8_e4m3fn if is_packed else spec.dtype, spec.shape)
        )
        if is_packed:
            tiles = (-(-spec.shape[0] // rows), -(-spec.shape[1] // columns))
            listed.append(TensorSpec(f"{spec.name}_scale_inv", torch.float32, tiles))
    return listed


def _list_integer_tensors(
    model: PreTrainedModel, specs: list[TensorSpec], settings: Mapping[str, Any]
) -> list[TensorSpec]:
    """Put compressed-tensors' words, scales and shapes in the place of the blocks' linears and
    experts that ``ignore`` does not name, as written or by ``re:`` patterns."""
    (group,) = settings["config_groups"].values()
    bits, size = int(group["weights"]["num_bits"]), int(group["weights"]["group_size"])
    left = settings.get("ignore") or []
    listed: list[TensorSpec] = []
    for spec, is_inside in _list_named_as_in_files(model, specs, []):
        stem = spec.name.removesuffix(".weight")
        ignored = any(
            re.match(entry.removeprefix("re:"), stem) if entry.startswith("re:") else entry == stem
            for entry in left
        )
        if not is_inside or ignored:
            listed.append(spec)
            continue
        rows, columns = spec.shape
        words = (rows, -(-columns * bits // 32))
        listed.append(TensorSpec(f"{spec.name}_packed", torch.int32, words))
        listed.append(TensorSpec(f"{spec.name}_scale", spec.dtype, (rows, columns // size)))
        listed.append(_ShapeSpec(f"{spec.name}_shape", torch.int64, (2,), spec.shape))
    return listed


def _list_named_as_in_files(
    model: PreTrainedModel, specs: list[TensorSpec], left: list[str]
) -> list[tuple[TensorSpec, bool]]:
    """Return tensors under the names of published files, first those that are not packed; with
    each, whether it is a matrix of the blocks' linears and experts that ``left`` does not name."""
    inside = {id(m) for block in find_decoder_blocks(model) for m in block.modules()}
    packed = set()
    for path, module in model.named_modules():
        if id(module) in inside and should_convert_module(path, left):
            if isinstance(module, nn.Linear):
                packed.add(f"{path}.weight")
            elif describe_experts(module):
                packed |= {f"{path}.{n}" for n, p in module.named_parameters() if p.dim() == 3}
    listed: list[tuple[TensorSpec, bool]] = []
    for is_packed in (False, True):
        parts = {
            spec.name: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            for spec in specs
            if (spec.name in packed) is is_packed
        }
        for name, tensor in revert_weight_conversion(model, parts).items():
            listed.append((TensorSpec(name, tensor.dtype, tuple(tensor.shape)), is_packed))
    return listed


def write_sparse_base(
    config_file: Path,
    directory: Path,
    *,
    shard_bytes: int = 5 * 2**30,
    dtype: torch.dtype = torch.bfloat16,
    head: str = "lm",
) -> Path:
    """Write ``directory`` with a copy of ``config_file`` and sparse safetensors files.

    Args:
        shard_bytes: a file holds at least one tensor, and no second one beyond this size.
        head: see ``list_base_tensors``.

    Raises:
        UserError: see ``list_base_tensors``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(config_file, directory / "config.json")
    shards: list[list[TensorSpec]] = [[]]
    held = 0  # bytes of the last one
    for spec in list_base_tensors(config_file, dtype, head):
        if shards[-1] and held + spec.num_bytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(spec)
        held += spec.num_bytes
    places: dict[str, str] = {}
    for number, specs in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, infos = build_header(specs, {"format": "pt"}, directory / file)
        with (directory / file).open("wb") as opened:
            opened.write(header)
            opened.truncate(len(header) + sum(s.num_bytes for s in specs))
            starts = {info.name: info.start for info in infos}
            for spec in specs:
                if isinstance(spec, _ShapeSpec):
                    opened.seek(starts[spec.name])
                    opened.write(np.asarray(spec.weight, "<i8").tobytes())
        places |= dict.fromkeys((info.name for info in infos), file)
    index = {"metadata": {}, "weight_map": places}
    (directory / INDEX_NAME).write_text(json.dumps(index))
    return directory
