"""Find the export formats that would refuse a run, before it is trained."""

import logging
from pathlib import Path

from dist_peft.adapters.protocol import Adapter
from dist_peft.core.config.run import RunConfig
from dist_peft.core.log import ONCE
from dist_peft.export.formats.export_format import PlannedExport
from dist_peft.export.formats.hf_bf16 import HfBf16Export
from dist_peft.export.formats.registry import list_export_forms
from dist_peft.model.skeleton import Skeleton

__all__ = ["find_export_obstacles", "log_export_outlook"]

log = logging.getLogger("dist_peft")


def find_export_obstacles(
    config: RunConfig, adapter: Adapter, skeleton: Skeleton, directory: Path
) -> dict[str, str]:
    """Return the reason for each form (``list_export_forms``) that this run cannot be written in.

    A form that is not in the result can be tried.

    Args:
        config: the run; ``base.quant`` is resolved from the files of a prequantized base.
        adapter: the run's method.
        skeleton: the model without weights, with the adapter attached or without.
        directory: directory of the base's files.
    """
    run = PlannedExport(config, skeleton, directory, adapter.get_export_limits(skeleton.tied))
    return {
        form.label: reason
        for known, form in list_export_forms()
        if (reason := known.find_obstacle(run, form.options))
    }


def log_export_outlook(
    config: RunConfig, adapter: Adapter, skeleton: Skeleton, directory: Path
) -> None:
    """Log once the forms that the run can be exported in, and the reasons against the others."""
    refused = find_export_obstacles(config, adapter, skeleton, directory)
    possible = [form.label for _, form in list_export_forms() if form.label not in refused]
    reasons: dict[str, list[str]] = {}
    for name, reason in refused.items():
        reasons.setdefault(reason, []).append(name)
    against = "; ".join(f"not {', '.join(names)}: {reason}" for reason, names in reasons.items())
    if (
        HfBf16Export.name in possible and refused
    ):  # it merges: the other reasons are for those who ask
        log.debug("exports of this run: %s", against, extra=ONCE)
        against = f"not {', '.join(refused)} (-v: why)"
    level = logging.INFO if possible else logging.WARNING
    forms = ", ".join(possible) or "nothing (dist-peft eval --run reads it)"
    log.log(level, "exports of this run: %s%s", forms, f"; {against}" * bool(against), extra=ONCE)
