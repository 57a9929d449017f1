"""The meta model of a planned run: from a base's files, or from its ``config.json`` alone."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from dist_peft.adapters.method_table import assemble_adapter, assemble_joined
from dist_peft.adapters.protocol import Adapter
from dist_peft.core.config.run import RunConfig
from dist_peft.core.config.sweep_points import split_sweep_configs
from dist_peft.core.errors import UserError
from dist_peft.data.labels import list_class_names
from dist_peft.model.hub import resolve_base_directory
from dist_peft.model.skeleton import Skeleton, build_skeleton
from dist_peft.model.sparse_base import write_sparse_base

__all__ = ["PlannedModel", "build_planned_model"]


_STEPS = 1000
"""Of a planned run, of which only shares matter."""


@dataclass(frozen=True)
class PlannedModel:
    """A model on meta with its adapter attached, not sharded.

    Attributes:
        config: of the run; ``base.quant`` of a prequantized base is that of its files.
        source: the files that the shapes are of.
        first_share: share of the steps that the layers are prepared for, the first ones, which
            take most memory (``StepHooks.prepare_phase``).
    """

    config: RunConfig
    skeleton: Skeleton
    adapter: Adapter
    source: str
    first_share: float = 1.0


def build_planned_model(
    config: RunConfig, base_config: Path | None = None, scratch: Path | None = None
) -> PlannedModel:
    """Build the model of ``config`` without weights.

    Args:
        base_config: a ``config.json`` to take the shapes from instead of ``base.path``, as of an
            unquantized base.
        scratch: where to leave the sparse files that are written for a ``config.json``; by default
            they are removed.

    Raises:
        UserError: no such file, or a model or adapter that cannot be built.
    """
    if base_config is not None:
        file = base_config / "config.json" if base_config.is_dir() else base_config
        if not file.is_file():
            raise UserError(f"--base-config {base_config} does not exist; give a config.json")
        return _build_from_config_file(config, file, scratch)
    directory = resolve_base_directory(config.base, weights=False)
    if any(directory.glob("*.safetensors")):
        return _build_from_directory(config, directory, str(directory))
    file = directory / "config.json"
    if not file.is_file():
        raise UserError(f"{directory} has no config.json; base.path must be a Hugging Face model")
    return _build_from_config_file(config, file, scratch)


def _build_from_config_file(config: RunConfig, file: Path, scratch: Path | None) -> PlannedModel:
    if scratch is not None:
        directory = write_sparse_base(file, scratch / "base", head=config.base.head)
        return _build_from_directory(config, directory, str(file))
    with tempfile.TemporaryDirectory(prefix="dist_peft_plan") as removed:
        directory = write_sparse_base(file, Path(removed) / "base", head=config.base.head)
        return _build_from_directory(config, directory, str(file))


def _build_from_directory(config: RunConfig, directory: Path, source: str) -> PlannedModel:
    skeleton = build_skeleton(config.base, directory, list_class_names(config.data))
    if skeleton.prequantized is not None:
        update = {"quant": skeleton.prequantized.quant_config}
        base = config.base.model_copy(update=update)
        config = config.model_copy(update={"base": base})
    adapter: Adapter
    if config.sweep is None:
        adapter = assemble_adapter(config, skeleton)
    else:
        adapter = assemble_joined(list(split_sweep_configs(config).values()), skeleton)
    if skeleton.head is not None:
        _set_any_pad_token(skeleton.model)
    adapter.attach_to_model(skeleton.model)
    share = adapter.prepare_phase(0, _STEPS) / _STEPS
    return PlannedModel(config, skeleton, adapter, source, share)


def _set_any_pad_token(model: nn.Module) -> None:
    """Give the model a padding token, which a run takes from the tokenizer; shapes have none."""
    text: Any = cast(Any, model).config.get_text_config()
    if text.pad_token_id is None:
        text.pad_token_id = 0
