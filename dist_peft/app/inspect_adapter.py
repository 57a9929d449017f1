"""Describe an adapter directory (this project's, PEFT's or AdapterHub's), readable or not.

Pickle files are named and never opened.
"""

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from dist_peft.adapters.adapter_format import ADAPTER_FORMATS, find_format
from dist_peft.adapters.directory import (
    check_public_adapter,
    choose_tensors_file,
    find_config_file,
    read_adapter_directory,
)
from dist_peft.adapters.fusion.format import is_fusion_config, list_fused_names
from dist_peft.adapters.low_rank.pooling import read_pooling_facts
from dist_peft.app.server_support import describe_vllm_support
from dist_peft.core.errors import UserError
from dist_peft.store.index import SafetensorsIndex

__all__ = ["describe_adapter", "describe_trained_weights", "load_json_object", "shorten_value"]

_PICKLES = tuple(dict.fromkeys(known.pickle_file for known in ADAPTER_FORMATS))
_TARGETS = {
    "target_modules": "targets",
    "target_parameters": "and",
    "feedforward_modules": "feedforward",
    "modules_to_save": "also whole",
}
"""Key of PEFT's configuration that names modules -> its label."""
_SHOWN = 12
_LONGEST = 100
"""Characters of a list or map that is printed whole."""


def describe_adapter(path: Path) -> list[str]:
    """Return lines about a directory with an ``adapter_config.json`` or of a fusion.

    Raises:
        UserError: the configuration or the safetensors file is damaged.
    """
    config = load_json_object(find_config_file(path))
    base = config.get("base_model_name_or_path", config.get("model_name"))
    lines = [
        f"adapter {path}",
        f"  method       {_describe_method(config)}",
        *_describe_pooling(config),
        f"  base         {base}",
    ]
    lines += [f"  {_describe_tensors(path, config)}"]
    lines += [f"  {label:<12} {text}" for label, text in _iterate_targets(config)]
    lines.append(f"  vLLM         {describe_vllm_support(config)}")
    if (reason := _find_read_obstacle(path)) is not None:
        lines.append(f"  not read     {reason}")
    own = path / "dist_peft.json"
    about = load_json_object(own) if own.is_file() else {}
    shown: dict[str, Any] = {"base": base, "adapter": {}}
    lines += [
        f"  {key:<12} {shorten_value(key, value)}"
        for key, value in about.items()
        if key not in shown or value != shown[key]
    ]
    for part in list_fused_names(config) if is_fusion_config(config) else ():
        if (path / part).is_dir():
            lines += ["  " + line for line in describe_adapter(path / part)]
    return lines


def describe_trained_weights(path: Path) -> list[str]:
    """Return lines about trained weights of the base (format: ``adapters.full.format``)."""
    about = load_json_object(path / "dist_peft.json")
    return [
        f"trained weights {path}",
        f"  method       {about.pop('kind')} fine-tuning",
        f"  {_format_parameter_count(SafetensorsIndex.open(path))}",
        *(f"  {key:<12} {shorten_value(key, value)}" for key, value in about.items()),
    ]


def shorten_value(key: str, value: Any) -> Any:
    """Shorten the record of a base (``store.base_record``) to its id, and long lists and maps to
    their length; ``inspect --json`` has all of them."""
    if key != "base_content" and isinstance(value, list | dict) and len(str(value)) > _LONGEST:
        return f"{len(value)} entries (--json)"
    if key != "base_content" or not isinstance(value, dict):
        return value
    tensors = value.get("tensors")
    count = len(tensors) if isinstance(tensors, dict) else 0
    return f"{value.get('id')}, hashes of {count} tensors"


def _describe_method(config: Mapping[str, Any]) -> str:
    """The method and its sizes in one line, those of methods that are not trained here too."""
    known = find_format(config)
    if known is not None:
        return known.describe(config)
    settings = {"r": config.get("r"), "alpha": config.get("lora_alpha", config.get("alpha"))}
    shown = [f"{name}={value}" for name, value in settings.items() if value is not None]
    return " ".join([str(config.get("peft_type")), *shown])


def _describe_pooling(config: Mapping[str, Any]) -> list[str]:
    pooling = read_pooling_facts(config)
    return [f"  pooling      {pooling.convention} of {pooling.size} inputs"] if pooling else []


def _describe_tensors(path: Path, config: Mapping[str, Any]) -> str:
    file = path / choose_tensors_file(config)
    if not file.is_file():
        pickle = next((name for name in _PICKLES if (path / name).is_file()), None)
        if pickle is not None:
            return f"parameters   in {pickle}, a pickle, which is not opened"
    return _format_parameter_count(SafetensorsIndex.open(file))


def _format_parameter_count(index: SafetensorsIndex) -> str:
    numbers = sum(prod(info.shape) for info in index.tensors.values())
    return f"parameters   {numbers:,} in {len(index.tensors)} tensors"


def _iterate_targets(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield label and text of PEFT's targets: names, or one regular expression or keyword."""
    for key in _TARGETS:
        if value := config.get(key):
            names = [value] if isinstance(value, str) else sorted(map(str, value))
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            yield _TARGETS[key], ", ".join(names[:_SHOWN]) + more


def _find_read_obstacle(path: Path) -> str | None:
    """Return the reason why this project cannot use the adapter; None if it can."""
    try:
        check_public_adapter(read_adapter_directory(path))
    except UserError as error:
        return str(error)
    return None


def load_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is unreadable or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it must hold a JSON object")
    return content
