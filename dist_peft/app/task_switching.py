"""Switch a merged directory from one run's adapter to another's, and compare with that run."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_peft.app.codec_versions import describe_other_codec
from dist_peft.app.finished_run import load_finished_run
from dist_peft.app.output_places import refuse_taken_place
from dist_peft.app.verified_export import VerificationOptions, choose_export_verification
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.export.formats.export_format import ExportFormat
from dist_peft.export.formats.export_spec import ExportSpec
from dist_peft.export.formats.registry import FORMATS
from dist_peft.export.merge_record import RECORD_NAME, MergeRecord, select_base_entries
from dist_peft.export.task_switch import SwitchJob, SwitchResult, switch_merged_directory
from dist_peft.export.time_limit import VerificationSkipped
from dist_peft.export.verdict import judge_comparison
from dist_peft.export.verify import Comparison, Probe
from dist_peft.export.verify_formats import ConsumerRequest
from dist_peft.model.skeleton import parse_torch_dtype
from dist_peft.store.base_record import BaseRecord

__all__ = ["switch_tasks"]

log = logging.getLogger("dist_peft")

_TRAINED = (
    *("the trained model", "untrained base"),
    "no closer to the trained model than the untrained base is: the adapter is lost",
)
_BASE = (
    *("the untrained base", "trained model"),
    "no closer to the untrained base than the trained model is: the adapter is still in it",
)
"""Names of the model to reach and of the other one, and words for an output that misses it."""


@dataclass(frozen=True)
class _TrainedRun:
    """A finished run."""

    directory: Path
    config: RunConfig

    @property
    def adapter_dir(self) -> Path:
        return self.directory / "adapter"


@torch.no_grad()
def switch_tasks(
    merged: Path,
    removed: Path | None,
    added: Path | None,
    out: Path,
    *,
    verify: VerificationOptions | None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> SwitchResult:
    """Write ``out``, the merged directory with the adapter of another run; compare its logits.

    Args:
        removed: run whose adapter ``merged`` holds; None: it holds none.
        added: run to switch to; None: to the base.
        verify: options of the comparison with the probe: the logits of ``added``'s trained model,
            or of the base before ``removed`` was trained; None: no comparison.

    Raises:
        UserError: the directory or a run cannot be switched, or ``out`` cannot be written.
        VerificationError: the written model is not that of the run.
    """
    refuse_taken_place(out, "--out")
    if not merged.is_dir():
        raise UserError(f"--merged {merged} is no directory")
    runs = {
        option: _TrainedRun(path, load_finished_run(path, trust_remote_code=trust_remote_code))
        for option, path in (("--from", removed), ("--to", added))
        if path is not None
    }
    for option, run in runs.items():
        if run.config.base.head == "classifier":
            raise UserError(
                f"{option} {run.directory} trained a classifier, whose head is trained whole: a "
                "merge of it cannot be taken back"
            )
    record = MergeRecord.read_from_directory(merged)
    for run in runs.values():
        _check_base_of_run(run, record, merged)
    probe = None
    if verify is not None and added is not None:
        probe = Probe.load_probe(added / "probe.safetensors")
    elif verify is not None and removed is not None:
        probe = Probe.load_probe(removed / "probe.safetensors").swap_models()
    base = next(iter(runs.values())).config.base
    source, target = runs.get("--from"), runs.get("--to")
    job = SwitchJob(
        merged,
        out,
        None if source is None else source.adapter_dir,
        None if target is None else target.adapter_dir,
        base,
        overwrite,
    )
    result = switch_merged_directory(job)
    error = "bit for bit as an export of that run" if result.exact else ""
    error = error or f"rounded twice: {result.rounding:.2g} of the change of the weights (rms)"
    log.info("wrote %s: %d weights switched, %s", out, result.changed, error)
    if probe is not None and verify is not None:
        _verify(target, source, out, result, probe, verify)
    return result


def _check_base_of_run(run: _TrainedRun, record: MergeRecord, merged: Path) -> None:
    """Compare the base of a run with that of the merged directory.

    Raises:
        UserError: they differ, or the merged weights depend on another quantization.
    """
    file = run.adapter_dir / "dist_peft.json"
    own = select_base_entries(run.adapter_dir)
    held = BaseRecord.from_metadata(record.base, merged / RECORD_NAME)
    if why := held.describe_difference(BaseRecord.from_metadata(own, file)):
        raise UserError(f"{run.directory} was trained on another base than {merged} has: {why}")
    quants = record.base.get("quant"), own.get("quant")
    if record.state != "original" and quants[0] != quants[1]:
        raise UserError(
            f"{run.directory} was trained on another quantization of the base (base.quant "
            f"{quants[1]}) than the weights of {merged} are of ({quants[0]}); merge or export that "
            "run instead"
        )
    if record.state != "original":
        for entries, where in ((own, file), (record.base, merged / RECORD_NAME)):
            quant = entries.get("quant")
            kind = quant.get("kind") if isinstance(quant, dict) else None
            if kind and (why := describe_other_codec(entries, kind, str(where))):
                raise UserError(f"{where} {why}; merge or export the run instead")


def _verify(
    target: _TrainedRun | None,
    source: _TrainedRun | None,
    out: Path,
    result: SwitchResult,
    probe: Probe,
    verify: VerificationOptions,
) -> None:
    """Load the directory with its consumer and compare; raises VerificationError.

    Without a ``target`` the goal is the base, and the probe that of ``source``.
    """
    run = target or source
    assert run is not None  # the command refuses a switch from none to none
    goal, origin, lost = _TRAINED if target else _BASE
    known = FORMATS[result.format]
    dtype = parse_torch_dtype(run.config.base.compute_dtype)
    request = ConsumerRequest(out, probe, dtype, verify.seconds, run.config.base.trust_remote_code)
    spec = ExportSpec(run.config.base, out, run.adapter_dir, out, pooled=result.format != "hf-bf16")
    compare = _choose_comparison(known, spec, request, verify)
    try:
        consumer, found = compare()
    except VerificationSkipped as error:
        log.warning("NOT VERIFIED: %s", error)
        return
    log.info("loaded by %s: %s", consumer, found.describe_distance(goal, origin))
    judge_comparison(found, out, exact=result.exact, max_error=verify.max_error, lost=lost)


def _choose_comparison(
    known: ExportFormat, spec: ExportSpec, request: ConsumerRequest, verify: VerificationOptions
) -> Callable[[], tuple[str, Comparison]]:
    needed = sum(file.stat().st_size for file in spec.out.glob("*.safetensors"))
    if choose_export_verification(known, needed, verify.verifier) == "blocks":
        return lambda: known.verify_blocks(spec, request.probe)
    return lambda: known.verify_export(spec, request)
