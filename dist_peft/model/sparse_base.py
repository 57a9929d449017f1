"""A base's directory without its weights: headers with the right shapes over files of holes.

``config.json`` alone says which tensors a base has. Files whose headers list them and whose data is
one hole (a sparse file takes no room on disk) can be opened, indexed and read like the real ones;
every number in them is zero.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from dist_peft.core.errors import UserError
from dist_peft.model.classifier import MODELS
from dist_peft.model.hub import REFUSALS, format_library_error
from dist_peft.store.format import TensorSpec, build_header
from dist_peft.store.index import INDEX_NAME

__all__ = ["list_base_tensors", "write_sparse_base"]


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
    try:
        config: Any = AutoConfig.from_pretrained(config_file)
        if hasattr(config, "quantization_config"):
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
    return specs


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
    for spec in list_base_tensors(config_file, dtype, head):
        if shards[-1] and sum(s.num_bytes for s in shards[-1]) + spec.num_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    places: dict[str, str] = {}
    for number, specs in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, infos = build_header(specs, {"format": "pt"}, directory / file)
        with (directory / file).open("wb") as opened:
            opened.write(header)
            opened.truncate(len(header) + sum(s.num_bytes for s in specs))
        places |= dict.fromkeys((info.name for info in infos), file)
    index = {"metadata": {}, "weight_map": places}
    (directory / INDEX_NAME).write_text(json.dumps(index))
    return directory
