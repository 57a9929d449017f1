"""``dist_peft.json``: where an adapter comes from, and facts that only this project's merge needs.

An adapter's configuration is part of the trained function: is it still as it was written?

``adapter_config.json`` holds the scale (``lora_alpha``, ``use_rslora``), the targets and the
patterns. Edited by hand it gives another function with tensors of the right shapes, so a copy is
kept in ``dist_peft.json``, which only this package writes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_peft.core.errors import UserError
from dist_peft.core.input_paths import refuse_special_file

__all__ = [
    "METADATA_FILE",
    "WEIGHT_KINDS",
    "WRITTEN_CONFIG",
    "parse_facts_and_labels",
    "read_adapter_metadata",
    "read_optional_json",
    "refuse_edited_config",
]

METADATA_FILE = "dist_peft.json"

WEIGHT_KINDS = ("full", "partial")
"""``kind`` in the ``dist_peft.json`` of trained weights (``adapters.full.format``)."""

WRITTEN_CONFIG = "adapter_config"
"""Key of ``dist_peft.json``: the contents of the configuration file as it was written."""

_DESCRIPTIVE = frozenset(
    {
        "base_model_name_or_path",
        "inference_mode",
        "init_lora_weights",
        "lora_dropout",
        "model_class",
        "model_name",
        "peft_version",
        "task_type",
        "version",
    }
)
"""Keys that do not change the function of a trained adapter; other libraries rewrite some."""


def read_adapter_metadata(directory: Path) -> dict[str, Any]:
    """Contents of ``dist_peft.json``; empty for an adapter that PEFT wrote.

    Raises:
        UserError: the file is damaged.
    """
    return read_optional_json(directory / METADATA_FILE) or {}


def read_optional_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    refuse_special_file(path)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}; get the adapter again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it must hold a JSON object")
    return content


def parse_facts_and_labels(
    metadata: Mapping[str, Any], file: Path
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return ``adapter`` and ``labels`` of the contents of ``dist_peft.json``.

    Raises:
        UserError: they are of another type, or the start is none that is known.
    """
    facts, labels = metadata.get("adapter", {}), metadata.get("labels", [])
    again = "get the adapter again"
    if not isinstance(facts, dict):
        raise UserError(f"{file} is damaged: adapter must hold a JSON object; {again}")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UserError(f"{file} is damaged: labels must be a list of names; {again}")
    start = facts.get("start", "default")
    if start not in ("default", "pissa", "loftq"):
        raise UserError(
            f"{file} is damaged: adapter.start is {start!r}, which no adapter has; {again}"
        )
    init = metadata.get("start", start)  # adapter.init of the run
    if init != start and {init, start} & {"pissa", "loftq"}:
        raise UserError(
            f"{file} is damaged: adapter.start is {start!r}, but start is {init!r}; {again}"
        )
    return facts, tuple(labels)


def refuse_edited_config(
    file: Path, config: Mapping[str, Any], metadata: Mapping[str, Any]
) -> None:
    """Compare a configuration with the copy that was kept when it was written.

    Args:
        file: the configuration, for the message.
        config: its contents. Keys that another library added do not count.
        metadata: contents of ``dist_peft.json``. Without a copy nothing is compared: PEFT wrote the
            adapter, or an older version of this package did.

    Raises:
        UserError: a key that determines the function has another value, or is absent.
    """
    written = metadata.get(WRITTEN_CONFIG)
    if not isinstance(written, Mapping):
        return
    for key, value in written.items():
        if key in _DESCRIPTIVE or _without_order(key, config.get(key)) == _without_order(
            key, value
        ):
            continue
        raise UserError(
            f"{file} says {key} {json.dumps(config.get(key))}, and the adapter was trained with "
            f"{json.dumps(value)}: the file was changed after the training; restore {key} in it"
        )


def _without_order(key: str, value: Any) -> Any:
    """PEFT keeps ``target_modules`` as a set and saves it in any order."""
    return sorted(map(str, value)) if key == "target_modules" and isinstance(value, list) else value
