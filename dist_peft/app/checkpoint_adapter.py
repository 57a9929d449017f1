"""The adapter of a checkpoint: files that a checkpoint keeps for it, and how to read it back."""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dist_peft.app.base_content import describe_lineage
from dist_peft.app.finished_run import select_training_settings
from dist_peft.app.model_setup import LoadedModel
from dist_peft.core.config.run import RunConfig

__all__ = ["describe_adapter", "format_adapter_files"]

_METADATA = "adapter.json"
_TEMPLATE = "chat_template.jinja"


def describe_adapter(
    config: RunConfig, built: LoadedModel, turn_end_ids: Sequence[int]
) -> dict[str, Any]:
    """Return the contents of the adapter's ``dist_peft.json``.

    Args:
        turn_end_ids: tokens that end the turns in the training data.
    """
    head = built.setup.skeleton.head
    return {
        **({} if head is None else {"labels": head.labels}),
        **built.record.to_metadata(),
        **describe_lineage(built.setup.skeleton),
        **select_training_settings(config),
        "start": getattr(config.adapter, "init", "default"),
        "turn_end": list(turn_end_ids),
        "dist_peft": importlib.metadata.version("dist_peft"),
        "torch": torch.__version__,
    }


def format_adapter_files(metadata: Mapping[str, Any], chat_template: str | None) -> dict[str, str]:
    """Return the files, by name, that a checkpoint keeps so that an adapter can be made of it.

    Args:
        metadata: contents of the adapter's ``dist_peft.json``.
        chat_template: template of the training data, if it is not the base's own.
    """
    files = {_METADATA: json.dumps(metadata, indent=1)}
    return files if chat_template is None else {**files, _TEMPLATE: chat_template}
