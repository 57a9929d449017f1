"""``dist-peft export --format peft``: export the adapter alone, load it with PEFT and compare."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_peft.adapters.adapter_format import find_format
from dist_peft.adapters.directory import (
    check_public_adapter,
    read_adapter_directory,
    write_adapter_directory,
)
from dist_peft.adapters.metadata import read_adapter_metadata
from dist_peft.adapters.qalora.format import expand_to_plain_lora, to_pooled_peft
from dist_peft.app.output_places import refuse_taken_place
from dist_peft.app.run_report import add_report_section
from dist_peft.core.config.run import QaLoraConfig, RunConfig
from dist_peft.core.errors import UserError
from dist_peft.export.model_directory import copy_tokenizer_files
from dist_peft.export.time_limit import VerificationSkipped, enforce_time_limit
from dist_peft.export.verdict import judge_comparison
from dist_peft.export.verify import Probe
from dist_peft.export.verify_adapter import verify_adapter
from dist_peft.model.hub import resolve_base_directory
from dist_peft.store.publish import check_output_free, publish_directory
from dist_peft.train.report import ReportSection

__all__ = ["VERIFY", "VerificationOptions", "export_adapter"]

log = logging.getLogger("dist_peft")

_WRITTEN_AS = {"peft": to_pooled_peft, "peft-expanded": expand_to_plain_lora}
"""Adapter format -> conversion of QA-LoRA; LoRA is the same in both."""


@dataclass(frozen=True)
class VerificationOptions:
    """Options of the comparison of an export with the trained model.

    Attributes:
        max_error: bound that replaces the form's, as a share of the change by training.
        seconds: time limit of the consumer.
    """

    max_error: float | None = None
    seconds: float = 600.0


VERIFY = VerificationOptions()


@torch.no_grad()
def export_adapter(
    config: RunConfig,
    run_dir: Path,
    name: str,
    out: Path,
    *,
    verify: VerificationOptions | None = VERIFY,
    overwrite: bool = False,
) -> None:
    """Write the adapter of a run as ``peft`` or ``peft-expanded`` and compare it in PEFT.

    Raises:
        UserError: PEFT has no such adapter, it is damaged, or ``out`` cannot be written.
        VerificationError: in PEFT on the base it does not compute the trained function.
    """
    refuse_taken_place(out, "--out")
    adapter = run_dir / "adapter"
    check_output_free(out, overwrite=overwrite, inputs=(run_dir,))
    public = read_adapter_directory(adapter)
    check_public_adapter(public)  # a damaged one is refused, not copied
    known = find_format(public.config)
    assert known is not None  # read_adapter_directory refuses others
    if reason := known.explain_no_peft_form(public.config):
        other = "dist-peft eval --run reads the run itself"
        if not known.peft_types:
            other = f"{adapter} already is in the format of AdapterHub's library"
        raise UserError(f"{run_dir} {reason}; {other}")
    probe = Probe.load_probe(run_dir / "probe.safetensors") if verify else None
    # only tensors and settings are copied: other files of the directory are not trusted
    with publish_directory(out) as partial:
        write_adapter_directory(partial, _WRITTEN_AS[name](public), read_adapter_metadata(adapter))
        copy_tokenizer_files(adapter, partial)
    log.info("wrote PEFT adapter %s", out)
    if probe is None or verify is None:
        return
    try:
        if name == "peft" and isinstance(config.adapter, QaLoraConfig):
            raise VerificationSkipped(
                "PEFT applies its own QA-LoRA to GPTQ linears only; --format peft-expanded is the "
                "same adapter as plain LoRA"
            )
        with enforce_time_limit("loading it with PEFT", verify.seconds):
            base = resolve_base_directory(config.base)
            consumer, found = verify_adapter(config.base, base, adapter, out, probe)
    except VerificationSkipped as error:
        log.warning("NOT VERIFIED: %s", error)
        return
    log.info("loaded by %s: %s", consumer, found)
    rows = [("Loaded by", consumer), *found.format_rows()]
    add_report_section(run_dir, ReportSection(f"Export {name}", rows=tuple(rows)))
    hint = ""
    if public.facts.get("start"):
        hint = (
            f"adapter.init {public.facts['start']} trained on the residual of the base, which no "
            "quantized base of PEFT is; of an NF4 base --format bnb-nf4 --keep-adapter "
            "keeps base and adapter as they were trained, or merge the run with --base decoded"
        )
    judge_comparison(found, out, exact=True, max_error=verify.max_error, hint=hint)
