"""Report the error of ``adapter/`` in PEFT's form after a run with PiSSA or LoftQ."""

import json
import logging
from pathlib import Path

from dist_peft.adapters.metadata import read_adapter_metadata
from dist_peft.app.model_setup import LoadedModel
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.export.formats.registry import list_export_forms
from dist_peft.export.outlook import find_export_obstacles
from dist_peft.export.peft_form import measure_peft_form
from dist_peft.store.writer import write_atomically

__all__ = ["find_exact_export_command", "report_peft_form"]

log = logging.getLogger("dist_peft")


def report_peft_form(config: RunConfig, built: LoadedModel, run_dir: Path) -> None:
    """Report the error of the adapter in PEFT on the original base, relative to the trained model.

    The error and the command of an exact export are logged and stored in ``adapter/dist_peft.json``
    as ``peft_form``; nothing for other initializations. The run has succeeded already, so a base
    that is no longer readable is a warning. Uses no process group.
    """
    adapter = run_dir / "adapter"
    try:
        found = measure_peft_form(config.base, built.setup.directory, adapter)
    except (OSError, UserError) as error:
        log.warning("how exact %s is with PEFT was not measured: %s", adapter, error)
        return
    if found is None:
        return
    command = find_exact_export_command(config, built, run_dir)
    about = read_adapter_metadata(adapter)
    about["peft_form"] = {
        "error": found.share,
        "of": "Frobenius norm of what training changed in the adapted weights",
        "base": "original",
        "linears": found.linears,
        "rows": found.rows,
        "exact": command,
    }
    write_atomically(adapter / "dist_peft.json", json.dumps(about, indent=2) + "\n")
    log.log(
        logging.INFO if found.is_exact else logging.WARNING,
        "%s with PEFT on the original base: weights differ from the trained ones by %.1f %% of "
        "the change by training (%d rows of %d linears; adapter.init %s trained on the "
        "residual of the base), logits by less, which export --format peft measures. Exact: %s",
        adapter,
        100 * found.share,
        found.rows,
        found.linears,
        about.get("start"),
        command,
    )


def find_exact_export_command(config: RunConfig, built: LoadedModel, run_dir: Path) -> str:
    """Return the command of an exact export, with a separate adapter where a format has one."""
    setup = built.setup
    refused = find_export_obstacles(config, setup.adapter, setup.skeleton, setup.directory)
    for known, form in list_export_forms():
        if known.get_content(form.options) == "separate" and form.label not in refused:
            return f"dist-peft export --run {run_dir} --format {form.label} --out OUT"
    return f"dist-peft merge --run {run_dir} --base decoded --out OUT"
