"""Read a finished run directory, which may be untrusted, to merge or export it.

``adapter/dist_peft.json`` is written with the adapter and records the training settings;
``config.yaml`` can be edited. Where the two disagree on the storage of the base, a merge would be
silently wrong, so it is refused.
"""

import json
from pathlib import Path
from typing import Any

from dist_peft.adapters.metadata import METADATA_FILE, read_adapter_metadata
from dist_peft.app.codec_versions import describe_codec, refuse_other_codec
from dist_peft.app.resolved_config import resolve_finished_run
from dist_peft.app.run_consistency import refuse_older_adapter
from dist_peft.app.tasks import refuse_separate_tasks
from dist_peft.core.config.io import load_run_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.export.stopping import read_turn_end_ids
from dist_peft.model.hub import warn_of_trusted_code

__all__ = ["load_finished_run", "select_training_settings"]


_ADAPTER_KEYS = {
    "adapter_kind": "adapter.kind",
    "through_quantizer": "adapter.through_quantizer",
    "through_zeros": "adapter.through_zeros",
}


def select_training_settings(config: RunConfig) -> dict[str, Any]:
    """Return the part of ``config`` that is needed to apply the adapter's tensors as trained.

    Stored in ``adapter/dist_peft.json``; ``load_finished_run`` compares it.
    """
    base = config.base.model_dump(mode="json", include={"quant", "compute_dtype", "head"})
    return {
        **base,
        "adapter_kind": config.adapter.kind,
        "through_quantizer": getattr(config.adapter, "through_quantizer", False),
        "through_zeros": getattr(config.adapter, "through_zeros", False),
        **describe_codec(config.base.quant),
    }


def load_finished_run(run_dir: Path, *, trust_remote_code: bool = False) -> RunConfig:
    """Return the configuration of a finished run, with its solved base if it has one.

    Args:
        run_dir: contains ``config.yaml`` and ``adapter/``; may have been moved.
        trust_remote_code: the caller's command line allows the base's code to run. The setting in
            the directory is ignored.

    Raises:
        UserError: no run, an unfinished one, one of several tasks, or a ``config.yaml`` that
            contradicts the adapter.
    """
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run_dir} is no run directory: it has no config.yaml")
    refuse_separate_tasks(run_dir)
    if not (run_dir / "adapter").is_dir():
        raise UserError(
            f"{run_dir} has no adapter/ yet: the run did not finish; resume it first, or take the "
            "adapter of a checkpoint with --checkpoint last"
        )
    refuse_older_adapter(run_dir)
    read_turn_end_ids(run_dir / "adapter")  # damaged ones are refused before the long work
    config = load_run_config(file, trust_remote_code=trust_remote_code)
    _refuse_contradiction(config, run_dir)
    warn_of_trusted_code(config.base)
    return resolve_finished_run(config, run_dir)


def _refuse_contradiction(config: RunConfig, run_dir: Path) -> None:
    """Raise UserError if ``config.yaml`` differs from the settings stored with the adapter."""
    adapter = run_dir / "adapter"
    trained = read_adapter_metadata(adapter)
    codec = describe_codec(config.base.quant)
    for key, stated in select_training_settings(config).items():
        if (
            key in codec or key not in trained or trained[key] == stated
        ):  # older adapters keep fewer facts
            continue
        name = _ADAPTER_KEYS.get(key, f"base.{key}")
        raise UserError(
            f"{run_dir / 'config.yaml'} says {name} {json.dumps(stated)}, and the adapter in "
            f"{run_dir / 'adapter'} was trained with {json.dumps(trained[key])}: config.yaml was "
            f"changed after the training; restore {name} in it"
        )
    where = str(adapter / METADATA_FILE)
    refuse_other_codec(trained, config.base.quant, f"the adapter in {adapter}", where)
