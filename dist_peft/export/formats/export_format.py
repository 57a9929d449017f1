"""An export format: one class that has everything about it.

A format is a module of this package with a subclass of ``ExportFormat``, or of ``PackedExport`` if
it packs the weights of linears, and an instance in ``registry.FORMATS``. Its options on the command
line, its row in ``export --list``, the refusals before training and before an export, the writer
and the verification come with the class.
"""

import argparse
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from dist_peft.adapters.export_limits import ExportContent, ExportLimits
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.export.adapter_copy import write_adapter_copy
from dist_peft.export.base_weights import join_parts
from dist_peft.export.formats.expert_layout import ExpertLayout
from dist_peft.export.formats.export_spec import ExportResult, ExportSpec
from dist_peft.export.merge_record import MergeRecord
from dist_peft.export.merged_weights import State
from dist_peft.export.model_directory import (
    WeightPacker,
    copy_tokenizer_files,
    describe_written_model,
    write_model_directory,
)
from dist_peft.export.rounding_floor import RoundingFloor
from dist_peft.export.stopping import add_stop_tokens
from dist_peft.export.verify import Comparison, Probe, compare_logits
from dist_peft.export.verify_formats import Consumer, ConsumerRequest
from dist_peft.model.frozen_linear import FrozenWeight, describe_stored_otherwise
from dist_peft.model.model_files import copy_model_files, list_model_files
from dist_peft.model.skeleton import Skeleton, parse_torch_dtype
from dist_peft.quant.codec import Codec, make_codec
from dist_peft.store.publish import publish_directory

__all__ = [
    "ACT_ORDER",
    "BITS",
    "GROUP_SIZE",
    "ExportForm",
    "ExportFormat",
    "ExportOption",
    "PackedExport",
    "PlannedExport",
]

Options = Mapping[str, Any]
"""Values of a format's options by ``ExportOption.key``; an absent one is not set."""


@dataclass(frozen=True, eq=False)
class ExportOption:
    """An option of the command line. Formats with the same option share one object.

    Attributes:
        name: without dashes, such as ``group-size``.
        help: its effect and default.
        settings: further arguments of ``ArgumentParser.add_argument``.
    """

    name: str
    help: str
    settings: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Name in ``ExportSpec.options``, such as ``group_size``."""
        return self.name.replace("-", "_")


BITS = ExportOption(
    "bits", "default: an integer base's own, else 4", {"type": int, "choices": (2, 3, 4, 8)}
)


def _parse_group_size(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) == 0 or int(text) % 8:
        raise argparse.ArgumentTypeError(f"{text} is no multiple of 8 above 0, such as 32 or 64")
    return int(text)


GROUP_SIZE = ExportOption(
    "group-size", "default: an integer base's own, else 64", {"type": _parse_group_size}
)


ACT_ORDER = (
    "its groups are of columns in act-order, which the format has not; gptq keeps them, and "
    "dist-peft merge dequantizes them"
)


@dataclass(frozen=True)
class ExportForm:
    """A format with options that have obstacles of their own.

    Attributes:
        label: as typed after ``--format``, such as ``bnb-nf4 --keep-adapter``.
        options: the options of the label.
    """

    label: str
    options: Options


@dataclass(frozen=True)
class PlannedExport:
    """A run that has not been trained, as formats see it.

    Attributes:
        config: the run; ``base.quant`` is resolved from the files of a prequantized base.
        skeleton: the model without weights.
        directory: directory of the base's files.
        limits: those of the run's method.
    """

    config: RunConfig
    skeleton: Skeleton
    directory: Path
    limits: ExportLimits

    @property
    def compute_dtype(self) -> torch.dtype:
        return parse_torch_dtype(self.config.base.compute_dtype)

    @property
    def codec(self) -> Codec:
        """Codec of the base's linears."""
        return make_codec(self.config.base.quant, self.compute_dtype)

    @cached_property
    def files_obstacle(self) -> str | None:
        """Why the base's files without weights cannot be copied; None: they can."""
        try:
            list_model_files(self.directory, code=self.config.base.trust_remote_code)
        except UserError as error:
            return str(error)
        return None


class ExportFormat(ABC):
    """A format of ``dist-peft export``."""

    name: ClassVar[str]
    """On the command line."""

    keeps: ClassVar[str]
    """The part of a run that it preserves, for the table of formats."""

    loads_with: ClassVar[str]
    """Libraries that load it, for the table of formats."""

    options: ClassVar[tuple[ExportOption, ...]] = ()
    """Its options on the command line."""

    reads_base: ClassVar[bool] = True
    """Whether the writer reads the base's files."""

    classifier_limit: ClassVar[str] = ""
    """Why it cannot hold a model with a classifier's head; empty: it can."""

    loaded_share: ClassVar[float] = 1.0
    """Size of the output once its library has loaded it, relative to that of dense weights in the
    run's compute type; at most."""

    has_blocks: ClassVar[bool] = False
    """Whether ``verify_blocks`` is there."""

    verification_limit: ClassVar[str] = ""
    """Runs of which the library does not compute with the output, for ``export --list``."""

    @property
    @abstractmethod
    def consumers(self) -> tuple[Consumer, ...]:
        """Libraries that ``verify_export`` loads the output with: the first one that is installed
        does it."""

    # -- before the export -------------------------------------------------------------------------

    @property
    def forms(self) -> tuple[ExportForm, ...]:
        """The format without options, and with those that have obstacles of their own."""
        return (ExportForm(self.name, {}),)

    def get_content(self, options: Options) -> ExportContent:
        """Return the content of the output with these options."""
        return "merged"

    def get_run_content(self, options: Options, limits: ExportLimits) -> ExportContent:
        """Return the content of the output of a run whose method has these limits."""
        return self.get_content(options)

    def find_obstacle(self, run: PlannedExport, options: Options) -> str | None:
        """Return why the run, once trained, cannot be written; None: it can be tried."""
        if reason := run.limits.get_reason(self.get_run_content(options, run.limits)):
            return reason
        return run.files_obstacle if self.reads_base else None

    def find_idle_options(self, options: Options) -> list[str]:
        """Return a sentence for each option that has no effect together with the others."""
        return []

    def explain_no_adapter(self) -> str:
        """Return the consequence and the fix for a run of trained weights, which has no adapter."""
        return f"so there is no separate adapter for format {self.name}; use dist-peft merge"

    # -- export ------------------------------------------------------------------------------------

    @abstractmethod
    def write_export(self, job: ExportSpec) -> ExportResult:
        """Write the output.

        Raises:
            UserError: the format cannot hold the run, ``job.out`` is not empty, the disk is full.
        """

    @abstractmethod
    def verify_export(self, job: ExportSpec, request: ConsumerRequest) -> tuple[str, Comparison]:
        """Load the output with its library and compare it with the trained model.

        Returns:
            Name and version of the library, and the comparison.

        Raises:
            VerificationSkipped: it is not installed, exceeded the time limit, or does not compute
                with the stored weights on this machine.
            VerificationError: it cannot load the output.
        """

    def verify_blocks(self, job: ExportSpec, probe: Probe) -> tuple[str, Comparison]:
        """Compare the output with the trained model without loading it whole, where
        ``has_blocks``.

        Returns:
            A description of the reader, and the comparison.

        Raises:
            VerificationError: the output cannot be read.
        """
        raise NotImplementedError(f"{self.name} is compared by its library only")

    def measure_rounding(
        self, job: ExportSpec, request: ConsumerRequest, *, by_blocks: bool
    ) -> RoundingFloor | None:
        """Compute with the output and with the base in float32; None: this form has no such look.

        Called where the error of an exact form of a 16-bit run is above its bound.

        Args:
            by_blocks: the output was compared by ``verify_blocks``.

        Raises:
            VerificationSkipped: it exceeded the time limit, or ``transformers`` has no such model.
        """
        return None

    # -- messages ----------------------------------------------------------------------------------

    def describe_result(self, result: ExportResult) -> str:
        """Return the line that is logged after the export."""
        written, size = result.written, result.written.bytes_written / 2**20
        return f"{result.path}, {result.how}: {written.packed} weights packed, {size:.1f} MiB"

    def list_report_rows(
        self, job: ExportSpec, result: ExportResult, consumer: str
    ) -> list[tuple[str, str]]:
        """Return the rows of the run's report, before those of the comparison."""
        return [("Written", result.how), ("Loaded by", consumer)]

    @property
    def report_title(self) -> str:
        """Title of the section of the run's report."""
        return f"Export {self.name}"

    def suggest_better(self, job: ExportSpec, result: ExportResult, found: Comparison) -> str:
        """Return options that lower the error; empty without any."""
        return "" if result.exact else "--base decoded, or more bits, lose less"


class PackedExport(ExportFormat):
    """A format that packs the weights of the blocks' linears, and of experts."""

    experts: ClassVar[ExpertLayout] = ExpertLayout()
    """The form of a mixture's experts."""

    keeps_column_order: ClassVar[bool] = False
    """Whether it has columns in groups in another order than theirs (act-order)."""

    joins_parts: ClassVar[bool] = False
    """Whether tensors that the model has in one are written as one
    (``base_weights.join_parts``)."""

    consumer: ClassVar[Consumer]
    """Library that loads the output, for the default ``verify_export``."""

    @property
    def consumers(self) -> tuple[Consumer, ...]:
        return (self.consumer,)

    def choose_experts(self, model: nn.Module, options: Options) -> ExpertLayout:
        """Return the form of experts in the output of ``model`` with these options."""
        return self.experts

    def find_obstacle(self, run: PlannedExport, options: Options) -> str | None:
        if reason := super().find_obstacle(run, options):
            return reason
        content = self.get_run_content(options, run.limits)
        codes = run.limits.trained_codes or run.limits.fits_zero_points
        model = run.skeleton.model
        layout = self.choose_experts(model, options)
        if reason := layout.find_obstacle(model, codes=codes, separate=content == "separate"):
            return f"the base is a mixture of experts: {reason}"
        if (codes or content == "separate") and not self.keeps_column_order:
            modules = run.skeleton.model.modules()
            if any(isinstance(m, FrozenWeight) and m.codec.ordered_rows for m in modules):
                return ACT_ORDER
        if run.config.base.head == "classifier" and self.classifier_limit:
            return f"the format is for language models: {self.classifier_limit}"
        if reason := _find_linear_obstacle(run.skeleton):
            return reason
        return self.find_packing_obstacle(run, options)

    def find_packing_obstacle(self, run: PlannedExport, options: Options) -> str | None:
        """Return why the weights of the run cannot be packed; None: they can."""
        return None

    def verify_export(self, job: ExportSpec, request: ConsumerRequest) -> tuple[str, Comparison]:
        consumer, logits = self.consumer.compute_logits(request)
        return consumer, compare_logits(logits, request.probe)

    def write_directory(
        self,
        job: ExportSpec,
        state: State,
        packer: WeightPacker,
        how: str,
        *,
        dtype: torch.dtype | None = None,
        exact: bool = False,
    ) -> ExportResult:
        """Write a directory that ``transformers`` or a library with its layout reads.

        In the state ``base`` the adapter is written next to it.

        Args:
            job: inputs of the export.
            state: state of the weights (``export.merged_weights``).
            packer: packs linears.
            how: see ``ExportResult``.
            dtype: type of everything that is not packed; default: the run's compute type.
            exact: see ``ExportResult``.
        """
        dtype, code = dtype or job.compute_dtype, job.base.trust_remote_code
        job.check_output()
        list_model_files(job.directory, code=code)  # fail before the export
        with publish_directory(job.out) as out:
            with job.open_weights(state) as walk:
                if reason := _find_linear_obstacle(walk.skeleton):
                    raise UserError(f"{job.directory} is not written as {self.name}: {reason}")
                layout = self.choose_experts(walk.skeleton.model, job.options)
                layout.prepare_weights(walk, packer, dtype)
                if self.joins_parts:
                    walk.weights = join_parts(walk.weights)
                if not self.keeps_column_order and any(map(walk.find_column_order, walk.weights)):
                    raise UserError(f"{job.directory} is not written as {self.name}: {ACT_ORDER}")
                written = write_model_directory(walk, packer, out, dtype, compute=job.compute_dtype)
                packing = packer.make_config(walk, list(written.unpacked))
                settings = {**describe_written_model(walk, job.directory, code=code), **packing}
            copy_model_files(job.directory, out, dtype, settings, code=code)
            copy_tokenizer_files(job.adapter_dir, out)
            stop_tokens = add_stop_tokens(job.adapter_dir, out)
            if state != "base":
                record = MergeRecord.of_adapter(
                    job.adapter_dir,
                    format=self.name,
                    state=state,
                    dtype=str(dtype).removeprefix("torch."),
                    stop_tokens=stop_tokens,
                )
                record.write_to_directory(out)
            else:
                write_adapter_copy(job.adapter_dir, out, base=job.out)
        return ExportResult(written, job.out, how, exact)


def _find_linear_obstacle(skeleton: Skeleton) -> str | None:
    """Return why the base's linears have no packed form; None: they have."""
    if reason := describe_stored_otherwise(skeleton.model):
        return f"{reason}, and packed forms are written of linears; merge the run (hf-bf16)"
    return None
