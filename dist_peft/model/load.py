"""Fill a sharded model: each rank reads and encodes its own rows.

For every parameter the engine says which rows are wanted (``span``); exactly these rows are read,
converted to the parameter's storage (packed bytes for ``FrozenWeight``, by ``WeightRows``; the
parameter's own type for all others: ``compute_dtype``, or float32 for trainable ones) and passed to
the engine (``fill``). One tensor is in memory at a time, and of it only this rank's rows. The
functions are injected, so that this file knows neither engines nor adapters.

At the end ``_check_filled`` fails if a parameter still is on ``meta``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.adapter_module import AdapterModule, InitializesFromBase
from dist_peft.model.frozen_linear import FrozenWeight, WeightRows, all_rows_finite
from dist_peft.store.reader import RowReader

__all__ = ["Placement", "load_model"]


class Placement(Protocol):
    """The part of an engine that loading needs."""

    def local_row_span(self, parameter: Tensor) -> Span: ...

    def fill_local_rows(self, owner: nn.Module, name: str, rows: Tensor) -> None: ...

    def sum_over_shards(self, tensor: Tensor) -> Tensor: ...


@dataclass
class _ParameterUse:
    owner: nn.Module
    name: str


def load_model(
    model: nn.Module,
    reader: RowReader,
    placement: Placement,
    device: torch.device,
    progress: Callable[[int], Any] = lambda done: None,
) -> None:
    """Fill every parameter and persistent buffer of ``model``.

    Initialization from the weight (PiSSA, LoftQ) takes collectives, in which a rank that cannot
    read its rows must not leave the others waiting. So the ranks that share a weight agree before:
    where one of them has failed, it raises, and the others return early with an unfilled model.
    Call this in ``World.raise_together``, which then raises on every rank.

    Args:
        model: built on meta, adapters attached, sharded.
        reader: the base's files.
        placement: the engine.
        device: device on which rows are encoded.
        progress: called with the number of parameters filled so far.

    Raises:
        UserError: a file was damaged or changed, a weight is not finite or out of range.
        OSError: the disk failed.
    """
    wrappers = {
        id(module.base): module
        for module in model.modules()
        if isinstance(module, InitializesFromBase)
    }
    failure: Exception | None = None
    for done, (first, *others) in enumerate(_list_parameter_uses(model).values()):
        owner, name = first.owner, first.name
        parameter = owner._parameters[name]
        assert parameter is not None
        span = placement.local_row_span(parameter)
        wrapper = wrappers.get(id(owner)) if name == "packed" else None
        rows = torch.empty(0)
        linear: WeightRows | None = None
        if failure is None:
            try:
                if isinstance(owner, FrozenWeight) and name == "packed":
                    linear = WeightRows.read_weight_rows(owner, reader, span, device)
                    rows = linear.to_packed() if wrapper is None else rows
                else:
                    rows = _init_or_read_rows(owner, name, span, reader)
            except (UserError, OSError) as error:
                failure = error
        if wrapper is not None:
            failed = torch.tensor(int(failure is not None), device=device)
            if placement.sum_over_shards(failed).item():
                break
            assert linear is not None
            reduce = placement.sum_over_shards
            rows = linear.to_packed(partial(wrapper.prepare_base_rows, span=span, reduce=reduce))
        if failure is not None:
            continue
        placement.fill_local_rows(owner, name, rows)
        for other in others:
            other.owner.register_parameter(other.name, owner._parameters[name])
        progress(done + 1)
    else:
        if failure is None:
            _fill_buffers(model, reader)
            _check_filled(model)
    if failure is not None:
        raise failure


def _list_parameter_uses(model: nn.Module) -> dict[int, list[_ParameterUse]]:
    """Return every parameter with the modules that hold it (tied ones have several).

    A wrapper's own parameters come right after those of the module it wraps: PiSSA, LoftQ and DoRA
    derive their initialization from the rows, which are freed as soon as possible.
    """
    wrappers: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, AdapterModule):
            wrappers.setdefault(id(module.base), []).append(module)
    order: list[nn.Module] = []
    for module in model.modules():
        if not isinstance(module, AdapterModule):
            order += [module, *wrappers.get(id(module), [])]
    uses: dict[int, list[_ParameterUse]] = {}
    for module in order:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                uses.setdefault(id(parameter), []).append(_ParameterUse(module, name))
    return uses


def _init_or_read_rows(
    owner: nn.Module,
    name: str,
    span: Span,
    reader: RowReader,
) -> Tensor:
    """Return rows ``span`` of a parameter that is not a packed weight, in its type."""
    parameter = owner._parameters[name]
    assert parameter is not None
    in_files: dict[str, str] = getattr(owner, "checkpoint_names", {})
    if isinstance(owner, AdapterModule) and name not in in_files:
        return owner.init_rows(name, span).to(parameter.dtype)
    source = in_files[name]
    read = reader.read_rows(source, span)
    rows = read.to(parameter.dtype)
    if not all_rows_finite(rows):
        raise UserError(
            f"tensor {source}: weight is not finite: NaN or infinity in a row; get the base again"
            if not all_rows_finite(read)
            else f"tensor {source}: weight is beyond the range of {parameter.dtype}; set "
            "base.compute_dtype to bfloat16 or float32"
        )
    return rows


def _fill_buffers(model: nn.Module, reader: RowReader) -> None:
    for module in model.modules():
        names: dict[str, str] = getattr(module, "checkpoint_names", {})
        for name, buffer in module.named_buffers(recurse=False):
            if name in names:
                buffer.copy_(reader.read_rows(names[name]))


def _check_filled(model: nn.Module) -> None:
    empty = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    assert not empty, f"never filled: {empty[:5]}"
