"""Fill a sharded model: each rank reads and encodes its own rows.

For every parameter the engine says which rows are wanted (``span``); exactly these rows are read,
converted to the parameter's storage (packed bytes for ``FrozenWeight``, by ``WeightRows``; the
parameter's own type for all others: ``compute_dtype``, or float32 for trainable ones) and passed to
the engine (``fill``). One tensor is in memory at a time, of it only this rank's rows, and of those
that are quantized only a panel (``panel_encoding``). The functions are injected, so that this file
knows neither engines nor adapters.

Parameters that nothing reads (vision towers, for tokens) stay on ``meta``, and a call of their
module fails. At the end ``_check_filled`` fails if another parameter still is there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_peft.core.errors import UserError
from dist_peft.core.progress_beat import mark_progress
from dist_peft.core.span import Span
from dist_peft.core.stop_signals import StopRequested, raise_if_stop_requested
from dist_peft.model.adapter_module import (
    AdapterModule,
    InitializesFromBase,
    KeepsPackedRows,
)
from dist_peft.model.frozen_linear import FrozenWeight, WeightRows, all_rows_finite
from dist_peft.model.panel_encoding import PanelEncoder
from dist_peft.model.parameter_readers import (
    is_never_read,
    list_unread_parameters,
    refuse_forward,
)
from dist_peft.store.reader import RowReader

__all__ = ["Placement", "load_model"]


class Placement(Protocol):
    """The part of an engine that loading needs."""

    def local_row_span(self, parameter: Tensor) -> Span: ...

    def fill_local_rows(self, owner: nn.Module, name: str, rows: Tensor) -> None: ...

    def sum_over_shards(self, tensor: Tensor) -> Tensor: ...


@dataclass
class _ParameterUse:
    """A module that holds a parameter, and the parameter's name in it."""

    owner: nn.Module
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is now: engines replace the object."""
        found = self.owner._parameters[self.name]
        assert found is not None
        return found

    @property
    def is_packed_weight(self) -> bool:
        return isinstance(self.owner, FrozenWeight) and self.name == "packed"


def load_model(
    model: nn.Module,
    reader: RowReader,
    placement: Placement,
    device: torch.device,
    progress: Callable[[int], Any] = lambda done: None,
    threads: int = 1,
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
        threads: that read and quantize the rows of a weight (``panel_encoding``).

    Raises:
        UserError: a file was damaged or changed, a weight is not finite or out of range.
        OSError: the disk failed.
        StopRequested: a signal has reached this rank.
    """
    wrappers = {  # the outer one, where a wrapper has others of the same module
        id(m.base): m
        for m in reversed(list(model.modules()))
        if isinstance(m, InitializesFromBase) and m.needs_base_rows
    }
    failure: Exception | None = None
    with PanelEncoder(reader, device, threads) as encoder:
        for done, (first, *others) in enumerate(_list_parameter_uses(model).values(), 1):
            mark_progress()
            span = placement.local_row_span(first.parameter)
            wrapper = wrappers.get(id(first.owner)) if first.is_packed_weight else None
            rows: Tensor | WeightRows = torch.empty(0)
            if failure is None:
                try:
                    raise_if_stop_requested()
                    if wrapper is None:
                        rows = _read_local_rows(first, span, reader, encoder)
                    else:
                        assert isinstance(first.owner, FrozenWeight)
                        rows = WeightRows.read_weight_rows(first.owner, reader, span, device)
                except (UserError, OSError, StopRequested) as error:
                    failure = error
            # a rank that failed reads no more but comes to the next agreement: others wait there
            if wrapper is not None and _failed_on_any_rank(failure, placement, device):
                break
            if failure is not None:
                continue
            if wrapper is not None:
                assert isinstance(rows, WeightRows)
                if isinstance(wrapper, KeepsPackedRows) and rows.linear.stored is not None:
                    wrapper.keep_packed_rows(rows.held, span)
                reduce = placement.sum_over_shards
                rows = rows.to_packed(partial(wrapper.prepare_base_rows, span=span, reduce=reduce))
            assert isinstance(rows, Tensor)
            placement.fill_local_rows(first.owner, first.name, rows)
            for (
                other
            ) in others:  # tied: all of them hold the object that the engine has just filled
                other.owner.register_parameter(other.name, first.owner._parameters[first.name])
            progress(done)
        else:
            if failure is None:
                _fill_buffers(model, reader)
                for path, module in model.named_modules():
                    if any(is_never_read(module, name) for name in module._parameters):
                        refuse_forward(module, path)
                _check_filled(model)
    if failure is not None:
        raise failure


def _read_local_rows(
    use: _ParameterUse, span: Span, reader: RowReader, encoder: PanelEncoder
) -> Tensor:
    """Return rows ``span`` of a parameter as it stores them."""
    if not use.is_packed_weight:
        return _init_or_read_rows(use, span, reader)
    assert isinstance(use.owner, FrozenWeight)
    return encoder.encode_rows(use.owner, span)


def _failed_on_any_rank(
    failure: Exception | None, placement: Placement, device: torch.device
) -> bool:
    """Agree with the ranks that share a weight, before a collective that all of them must enter."""
    failed = torch.tensor(int(failure is not None), device=device)
    return bool(placement.sum_over_shards(failed).item())


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
            if parameter is not None and not is_never_read(module, name):
                uses.setdefault(id(parameter), []).append(_ParameterUse(module, name))
    return uses


def _init_or_read_rows(use: _ParameterUse, span: Span, reader: RowReader) -> Tensor:
    """Return rows ``span`` of a parameter that is not a packed weight, in its type."""
    owner, name, dtype = use.owner, use.name, use.parameter.dtype
    in_files: dict[str, str] = getattr(owner, "checkpoint_names", {})
    if isinstance(owner, AdapterModule) and name not in in_files:
        return owner.init_rows(name, span).to(dtype)
    source = in_files[name]
    read = reader.read_rows(source, span)
    rows = read.to(dtype)
    if not all_rows_finite(rows):
        raise UserError(
            f"tensor {source}: weight is not finite: NaN or infinity in a row; get the base again"
            if not all_rows_finite(read)
            else f"tensor {source}: weight is beyond the range of {dtype}; set "
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
    unread = list_unread_parameters(model)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    empty = [n for n, t in tensors if t.is_meta and id(t) not in unread]
    assert not empty, f"never filled: {empty[:5]}"
