"""An adapter's configuration is part of the trained function: is it still as it was written?

``adapter_config.json`` holds the scale (``lora_alpha``, ``use_rslora``), the targets and the
patterns. Edited by hand it gives another function with tensors of the right shapes, so a copy is
kept in ``dist_peft.json``, which only this package writes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_peft.core.errors import UserError

__all__ = ["WRITTEN_CONFIG", "refuse_edited_config"]

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
        "task_type",
        "version",
    }
)
"""Keys that do not change the function of a trained adapter; other libraries rewrite some."""


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
