"""Protocols of adapter methods, and matching of their targets.

Life of an adapter::

    attach(model)              on the meta skeleton: wrap modules, create fp32 meta parameters
    prepare_base_rows, init_rows the loader asks each wrapped module for its initialization
    begin(step, sample_ids)    before each micro-batch: the inputs of dropout masks
    penalize(loss, parts)      before its backward pass: the method's own share of the gradient
    to_public(tensors, base)   gathered parameters -> the form that other libraries read

Engines replace ``Parameter`` objects when they shard, so a module never keeps one: it reads
``self.lora_A`` again in each forward.

Targets follow PEFT: ``all-linear`` or a list of names, name endings and regular expressions.
"""

import difflib
import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.experts import ExpertStack
from dist_peft.model.frozen_linear import FrozenWeight

__all__ = [
    "Adapter",
    "AdapterDefaults",
    "AdapterModule",
    "InitializesFromBase",
    "PublicAdapter",
    "PublicHead",
    "Reduce",
    "TrainsBaseWeights",
    "check_pattern_keys",
    "collect_gathered_parameters",
    "derive_seed",
    "list_adapter_targets",
    "resolve_pattern_value",
]

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the ranks that share a weight; all of them call it in the same order."""

log = logging.getLogger(__name__)

Value = TypeVar("Value")


@runtime_checkable
class AdapterModule(Protocol):
    """An ``nn.Module`` that owns adapter parameters directly."""

    def init_rows(self, name: str, span: Span) -> Tensor:
        """Return the initial values of rows ``span`` of the own parameter ``name``; called once.

        The same whatever the number of ranks.
        """
        ...


@runtime_checkable
class InitializesFromBase(AdapterModule, Protocol):
    """An adapter module around a ``FrozenLinear`` named ``base`` that sees its rows first."""

    def prepare_base_rows(self, rows: Tensor, span: Span, reduce: Reduce) -> Tensor:
        """Return the rows to quantize; called once and before ``init_rows``.

        Args:
            rows: float32 ``[len(span), in]``, this rank's rows of the weight, maybe none.
            span: which rows these are.
            reduce: sums over the ranks that share the weight.
        """
        ...


@dataclass(frozen=True)
class PublicHead:
    """A trained classification head.

    Attributes:
        labels: names of the classes, in the order of their ids.
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


class Adapter(Protocol):
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

    def add_penalty_gradient(self, loss: Tensor, parts: int) -> None:
        """Let the backward pass of ``loss`` add the gradient of this method's own penalty on
        parameters, if it has one.

        Args:
            loss: the micro-batch's, as it is handed to the engine, which may scale it.
            parts: how many backward passes the optimizer step has, over all ranks. Each adds its
                share, as gradients are added up.
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

    def to_public_adapter(self, tensors: Mapping[str, Tensor], base: str) -> PublicAdapter:
        """The public form.

        Args:
            tensors: every adapter parameter by full name, whole, float32, on the CPU.
            base: path or hub id of the base, as the configuration names it.

        Raises:
            RuntimeError: a tensor is absent, empty or has the wrong shape.
        """
        ...


class AdapterDefaults:
    """Default hooks of most methods: no extra positions, no penalty, one learning rate, no initial
    factors, no files that are read again."""

    @property
    def num_extra_positions(self) -> int:
        return 0

    def add_penalty_gradient(self, loss: Tensor, parts: int) -> None:
        pass

    def get_lr_scale(self, name: str) -> float:
        return 1.0

    def list_init_factors(self) -> tuple[str, ...]:
        return ()

    def set_init_factors(self, tensors: Mapping[str, Tensor]) -> None:
        pass

    def input_fingerprint(self) -> str:
        return ""


@runtime_checkable
class TrainsBaseWeights(Protocol):
    """An ``Adapter`` whose trained parameters are weights of the base itself.

    They are too many to be gathered at once, so they are written one by one, under the names of the
    base's files (``adapters.full.format``), and not by ``to_public_adapter``.
    """

    def list_source_tensors(self) -> Mapping[str, str]:
        """Map the full name of each trainable parameter to its tensor in the base's files."""
        ...

    def get_first_step(self, name: str) -> int:
        """Optimizer steps before the first update of the parameter with this full name."""
        ...


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


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed from printable parts: the same in every process, on every platform."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def list_adapter_targets(
    targets: Literal["all-linear"] | Sequence[str], model: nn.Module
) -> list[str]:
    """Names of the ``FrozenLinear`` and ``ExpertStack`` modules to adapt, in the model's order.

    ``all-linear`` is every one but the output head and modules that no gradient reaches. An entry
    of a list matches a module whose whole name it is, whose name ends with ``.entry``, or whose
    whole name it matches as a regular expression; an entry that matches an experts module means
    both of its stacks. The output head is adapted if an entry names it.

    Raises:
        UserError: an entry matches nothing.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, FrozenWeight)}
    if targets == "all-linear":
        inside = [name for name, module in linears.items() if not module.is_head]
        chosen = [name for name in inside if not linears[name].without_gradient]
        if left := sorted({re.sub(r"\d+", "*", name) for name in set(inside) - set(chosen)}):
            log.info(
                "adapter.target_modules all-linear leaves out %s: no gradient reaches them",
                ", ".join(left),
            )
        if not chosen:
            raise UserError("adapter.target_modules all-linear: the model has no linear to adapt")
        return chosen
    wanted: set[str] = set()
    for entry in targets:
        found = [
            name for name, module in linears.items() if _matches_target_module(entry, name, module)
        ]
        if not found:
            others = (n for n, m in model.named_modules() if _matches_module_name(entry, n))
            raise _build_no_match_error(entry, linears, next(others, None))
        wanted.update(found)
    return [name for name in linears if name in wanted]


def resolve_pattern_value(pattern: Mapping[str, Value], name: str, default: Value) -> Value:
    """The value of the first key that matches the module's name, by PEFT's rule.

    A key is a regular expression for the whole name or for its ending after a dot.
    """
    return next((v for key, v in pattern.items() if _matches_name_ending(key, name)), default)


def check_pattern_keys(key: str, pattern: Iterable[str], names: Iterable[str]) -> None:
    """Refuse entries of ``adapter.<key>`` that match no adapted module.

    Raises:
        UserError: see above.
    """
    names = list(names)
    for entry in pattern:
        try:
            used = any(_matches_name_ending(entry, name) for name in names)
        except re.error as error:
            raise UserError(f"adapter.{key}[{entry!r}] is no regular expression: {error}") from None
        if not used:
            raise UserError(
                f"adapter.{key}[{entry!r}] matches no adapted module; "
                f"{_format_known_names(entry, names)}"
            )


def _matches_name_ending(key: str, name: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({key})", name) is not None


def _matches_target_module(entry: str, name: str, module: nn.Module) -> bool:
    owner = name.rpartition(".")[0]
    return _matches_module_name(entry, name) or (
        isinstance(module, ExpertStack) and _matches_module_name(entry, owner)
    )


def _matches_module_name(entry: str, name: str) -> bool:
    if name == entry or name.endswith(f".{entry}"):
        return True
    try:
        return re.fullmatch(entry, name) is not None
    except re.error as error:
        raise UserError(
            f"adapter.target_modules entry {entry!r} is neither a module's name nor a regular "
            f"expression: {error}"
        ) from None


def _build_no_match_error(entry: str, linears: Iterable[str], other: str | None) -> UserError:
    """``other``: a module that the entry does match, but which is no ``FrozenLinear``."""
    message = f"adapter.target_modules entry {entry!r} matches no linear"
    if other is not None:
        message += (
            f" ({other} is not a quantizable linear; the input embedding is adapted by "
            "adapter.embeddings: true, an output head tied to it cannot be)"
        )
    return UserError(f"{message}; {_format_known_names(entry, linears)}")


def _format_known_names(entry: str, names: Iterable[str]) -> str:
    """Which last components exist, and the one nearest to ``entry``."""
    names = list(names)
    last = sorted({name.rpartition(".")[2] for name in names})
    near = difflib.get_close_matches(entry.rpartition(".")[2], last, n=1, cutoff=0.5)
    near = near or difflib.get_close_matches(entry, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}There are: {', '.join(last)}"
