"""Protocols of adapter methods: training (``Adapter``), files (``AdapterFormat``), merging
(``WeightMerger``).

Life of an adapter::

    attach(model)              on the meta skeleton: wrap modules, create fp32 meta parameters
    prepare_base_rows, init_rows the loader asks each wrapped module for its initialization
    begin(step, sample_ids)    before each micro-batch: the inputs of dropout masks
    penalize(loss, parts)      before its backward pass: the method's own share of the gradient
    to_public(tensors, base)   gathered parameters -> the form that other libraries read

Engines replace ``Parameter`` objects when they shard, so a module never keeps one: it reads
``self.lora_A`` again in each forward. The loader's side is ``model.adapter_module``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from dist_peft.adapters.export_limits import NONLINEAR_LIMITS, ExportLimits
from dist_peft.adapters.step_hooks import NoStepHooks, StepHooks
from dist_peft.core.span import Span
from dist_peft.core.trainable_steps import TrainableSteps
from dist_peft.quant.codec_defaults import AffineParts, AffineRows

__all__ = [
    "NONLINEAR_LIMITS",
    "Adapter",
    "AdapterDefaults",
    "AdapterFormat",
    "AdapterReader",
    "ExportLimits",
    "PeftFormat",
    "PublicAdapter",
    "PublicHead",
    "TrainsBaseWeights",
    "WeightMerger",
    "collect_gathered_parameters",
]


@dataclass(frozen=True)
class PublicHead:
    """A trained classification head; or, without labels, the trained routers of a mixture.

    Attributes:
        labels: names of the classes, in the order of their ids; empty for routers.
        tensors: its parameters under the model's names, such as ``classifier.weight``.
        model_class: such as BertForSequenceClassification; empty where it is not known.
    """

    labels: tuple[str, ...]
    tensors: dict[str, Tensor]
    model_class: str = ""


@dataclass(frozen=True)
class PublicAdapter:
    """An adapter as its ecosystem stores it.

    Attributes:
        config: the contents of ``adapter_config.json``.
        tensors: the contents of the safetensors file next to it.
        facts: metadata that only this project's merge needs (see ``adapters.directory``).
        extra: tensors that belong to ``facts``; no other library reads them.
        head: the classification head trained on top (``adapters.classifier_head.format``).
        parts: adapters by name, each of which has a directory of its own in this one's.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    head: PublicHead | None = None
    parts: dict[str, "PublicAdapter"] = field(default_factory=dict)


class Adapter(StepHooks, Protocol):
    """An adapter method, made from its section of the configuration."""

    @property
    def num_extra_positions(self) -> int:
        """Positions that it takes in front of each document (virtual tokens)."""
        ...

    def attach_to_model(self, model: nn.Module) -> None:
        """Wrap the targets of ``model``.

        Raises:
            UserError: a target matches nothing, or the method does not fit the model.
        """
        ...

    def begin_micro_batch(self, step: int, sample_ids: Tensor) -> None:
        """Set the optimizer step and the sequences' global indices, ``[B]``."""
        ...

    def add_penalty_gradient(self, loss: Tensor, parts: float) -> None:
        """Let the backward pass of ``loss`` add the gradient of this method's own penalty on
        parameters, if it has one.

        Args:
            loss: the micro-batch's, as it is handed to the engine, which may scale it.
            parts: how many backward passes the optimizer step has, over all ranks. Each adds its
                share, as gradients are added up. Infinite: this one adds nothing.
        """
        ...

    def get_lr_scale(self, name: str) -> float:
        """Return the learning-rate factor of the parameter with this full name."""
        ...

    def list_init_factors(self) -> tuple[str, ...]:
        """Full names of frozen parameters that a checkpoint must keep: they come from an
        algorithm that is not repeated on resume."""
        ...

    def set_init_factors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the whole tensors named by ``list_init_factors``, before the model is loaded."""
        ...

    def input_fingerprint(self) -> str:
        """Return a fingerprint of the files read at each ``attach_to_model``; empty without any.
        A run must not be resumed with other contents."""
        ...

    def get_export_limits(self, tied: bool) -> ExportLimits:
        """Return the reasons against exports of such an adapter.

        Args:
            tied: the base's output head shares the input embedding's weight.
        """
        ...

    def to_public_adapter(self, tensors: Mapping[str, Tensor], base: str) -> PublicAdapter:
        """The public form.

        Args:
            tensors: every adapter parameter by full name, whole, float32, on the CPU.
            base: path or hub id of the base, as the configuration names it.

        Raises:
            RuntimeError: a tensor is absent, empty or has the wrong shape.
        """
        ...


class AdapterDefaults(NoStepHooks):
    """Default hooks of most methods: no extra positions, no penalty, one learning rate, no initial
    factors, no files that are read again, no limits of exports."""

    @property
    def num_extra_positions(self) -> int:
        return 0

    def add_penalty_gradient(self, loss: Tensor, parts: float) -> None:
        pass

    def get_lr_scale(self, name: str) -> float:
        return 1.0

    def list_init_factors(self) -> tuple[str, ...]:
        return ()

    def set_init_factors(self, tensors: Mapping[str, Tensor]) -> None:
        pass

    def input_fingerprint(self) -> str:
        return ""

    def get_export_limits(self, tied: bool) -> ExportLimits:
        return ExportLimits()


@runtime_checkable
class TrainsBaseWeights(Protocol):
    """An ``Adapter`` whose trained parameters are weights of the base itself.

    They are too many to be gathered at once, so they are written one by one, under the names of the
    base's files (``adapters.full.format``), and not by ``to_public_adapter``.
    """

    def list_source_tensors(self) -> Mapping[str, str]:
        """Map the full name of each trainable parameter to its tensor in the base's files."""
        ...

    def get_trainable_steps(self, name: str) -> TrainableSteps:
        """Return the steps in which the parameter with this full name is updated."""
        ...


class AdapterReader(Protocol):
    """Reads the directory of any method's adapter (``directory.read_adapter_directory``).

    Methods that start from adapters on disk are given one, since they lie below the table of
    formats.
    """

    def __call__(self, directory: Path, values: bool = True) -> PublicAdapter: ...


class WeightMerger(Protocol):
    """Merges one adapter into rows of the base, by weight name ``PATH.weight``.

    Row-local: a base of any size is merged in chunks, in any order, each row once.
    """

    def changes_weight(self, weight: str) -> bool:
        """Return whether the adapter changes this weight."""
        ...

    def check_weight_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Compare the adapter with the base's shapes before a row is merged.

        Args:
            shapes: weight name -> rows and columns in the base.

        Raises:
            UserError: the base has no such weight, or of another shape.
        """
        ...

    def merge_weight_rows(
        self, weight: str, rows: Tensor, span: Span, in_base: Literal["original", "decoded"]
    ) -> Tensor:
        """Return rows ``span`` of a weight with the adapter in them.

        Args:
            weight: a name that ``changes_weight``.
            rows: floating point ``[len(span), columns]``, of the files' type perhaps.
            span: rows of the weight.
            in_base: original: rows of the base's files. decoded: rows as training saw them.
        """
        ...

    def compute_encoded_rows(self, weight: str, rows: Tensor, span: Span) -> Tensor:
        """Return the rows that were quantized: without the initial product of PiSSA and LoftQ;
        merged ones after a training through the quantizer."""
        ...

    def finish_packed_rows(
        self, weight: str, packed: Tensor, span: Span, rows: AffineRows | None, columns: int
    ) -> Tensor:
        """Return packed rows of ``compute_encoded_rows`` with zeros that training moved.

        Args:
            packed: ``uint8 [len(span), row_bytes]``.
            rows: how they are split (``Codec.affine_rows``).
            columns: of the weight.
        """
        ...

    def merge_affine_parts(self, weight: str, parts: AffineParts, span: Span) -> AffineParts:
        """Return integer codes whose zeros hold the adapter (QA-LoRA)."""
        ...

    def compute_group_change(self, weight: str, parts: AffineParts, span: Span) -> Tensor:
        """Return the change of each group ``[len(span), groups]`` (QA-LoRA)."""
        ...

    def list_unused_tensors(self) -> list[str]:
        """Return weights of which not every row was merged."""
        ...


class AdapterFormat(Protocol):
    """How a method's adapters lie on disk, and how they merge."""

    @property
    def peft_types(self) -> tuple[str, ...]:
        """Values of ``peft_type`` in its configuration; none where the format is not PEFT's."""
        ...

    @property
    def config_file(self) -> str:
        """Name of the configuration."""
        ...

    @property
    def tensors_file(self) -> str:
        """Name of the safetensors file."""
        ...

    @property
    def pickle_file(self) -> str:
        """Name of the file that the library writes instead without ``safe_saving``."""
        ...

    @property
    def safe_saving(self) -> str:
        """Call of that library that writes ``choose_tensors_file``."""
        ...

    @property
    def joins_head(self) -> bool:
        """Whether a classifier's head is in ``choose_tensors_file``, as PEFT has it."""
        ...

    @property
    def on_gptq_linears(self) -> bool:
        """Whether the ecosystem's library applies the method to GPTQ linears."""
        ...

    @property
    def on_bnb_linears(self) -> bool:
        """Whether it applies the method to linears of bitsandbytes."""
        ...

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Return whether these contents of a configuration are of this method."""
        ...

    def check(self, public: PublicAdapter) -> None:
        """Compare every tensor with the configuration.

        Raises:
            UserError: one is empty, absent, or of the wrong shape.
        """
        ...

    def describe(self, config: Mapping[str, Any]) -> str:
        """Return the method and its sizes in one line, for ``dist-peft inspect``."""
        ...

    def explain_no_peft_form(self, config: Mapping[str, Any]) -> str | None:
        """Return the reason why PEFT cannot load the adapter; None: it can."""
        ...

    def open_merger(self, public: PublicAdapter, *, tied: bool) -> WeightMerger:
        """Return the merger.

        Args:
            public: checked by ``check``.
            tied: the base's output head shares the input embedding's weight.

        Raises:
            UserError: no weight of the base can hold this adapter.
        """
        ...


class PeftFormat:
    """Base class of formats in the files of Hugging Face PEFT, found by their ``peft_type``."""

    peft_types: tuple[str, ...] = ()
    config_file = "adapter_config.json"
    tensors_file = "adapter_model.safetensors"
    pickle_file = "adapter_model.bin"
    safe_saving = "PEFT: save_pretrained(..., safe_serialization=True)"
    joins_head = True
    on_gptq_linears = True
    on_bnb_linears = True

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Return whether ``peft_type`` is one of ``peft_types``."""
        return config.get("peft_type") in self.peft_types

    def explain_no_peft_form(self, config: Mapping[str, Any]) -> str | None:
        """Return None: PEFT loads the adapter."""
        return None


def collect_gathered_parameters(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> dict[str, dict[str, Tensor]]:
    """Gathered parameters by full name -> path -> own name -> parameter.

    Args:
        tensors: see ``Adapter.to_public_adapter``.
        shapes: path of each adapter module -> own name -> the shape it must have.

    Raises:
        RuntimeError: a tensor is absent, empty or has the wrong shape.
    """
    whole: dict[str, dict[str, Tensor]] = {}
    for path, own in shapes.items():
        whole[path] = {}
        for name, shape in own.items():
            value = tensors.get(f"{path}.{name}")
            if value is None or tuple(value.shape) != shape or value.numel() == 0:
                found = "is absent" if value is None else f"has shape {list(value.shape)}"
                raise RuntimeError(
                    f"adapter tensor {path}.{name} {found}, expected {list(shape)}: "
                    "the parameters were not gathered"
                )
            whole[path][name] = value
    return whole
