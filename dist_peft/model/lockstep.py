"""Forward passes of several callers through one model, unit by unit.

An engine gathers a unit (a block, an embedding, a head) in hooks around its call. Callers whose
batches are not to be joined, since products of other shapes have other bits, still share these
hooks: each runs in a thread of its own, one at a time, and waits where it calls a unit. When all
have come to it, the unit is called once, with all their inputs, and inside of this call each
computes its own::

    caller 0   embed | block 0 |         block 1 |
    caller 1         |         embed ... |       | block 1 ...
    hooks      [ embed: 0, 1 ] [ block 0: 0, 1 ] [ block 1: 0, 1 ] ... [ head: 0, 1 ]

The engine sees one call of each unit, whose inputs and outputs are tuples of the callers'. So it
gathers once, frees once, and in backward has one node for all callers: their gradients go through a
block together. Each caller runs the operators of its pass alone, on the same tensors: the same
bits.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Lockstep"]

Result = TypeVar("Result")


@dataclass
class _Call:
    """A caller waits at a unit, with its inputs; ``forward`` computes them."""

    unit: nn.Module
    forward: Callable[..., Any]
    inputs: Any


@dataclass
class _Output:
    """A caller has computed a unit."""

    value: Any


@dataclass
class _End(Generic[Result]):
    """A caller is done."""

    result: Result


@dataclass
class _Failure:
    error: BaseException


@dataclass
class _Caller:
    """A thread that runs while the others wait.

    Attributes:
        event: that it waits with.
        answer: that it continues with; a ``_Failure`` is raised there.
        own_forwards: ``forward`` that it has put on units, which others do not see.
    """

    thread: threading.Thread | None = None
    may_run: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    has_stopped: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    event: Any = None
    answer: Any = None
    own_forwards: dict[nn.Module, Any] = field(default_factory=dict)


_callers = threading.local()


class Lockstep:
    """Runs callers of a model in lockstep.

    Args:
        model: is a unit as well.
        units: modules with hooks of an engine; may be inside of one another.
        enter_share: the context of a caller while it computes, by its number.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[nn.Module],
        enter_share: Callable[[int], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self._units = list(dict.fromkeys([model, *units]))
        self._enter_share = enter_share or (lambda number: nullcontext())
        self._callers: dict[int, _Caller] = {}

    def run(self, calls: Mapping[int, Callable[[], Result]]) -> dict[int, Result]:
        """Return the result of each caller, by its number.

        Args:
            calls: each calls the model, or its units in the same order as the others.

        Raises:
            BaseException: the first error of a caller; the others are stopped.
        """
        self._callers = {number: _Caller() for number in calls}
        with self._units_waiting():
            try:
                for number, call in calls.items():
                    self._start_caller(number, call)
                events = {number: self._resume(number, None) for number in calls}
                while isinstance(next(iter(events.values())), _Call):
                    events = self._resume_all(self._call_unit(events))
                return {number: event.result for number, event in events.items()}
            except BaseException as error:
                self._stop_callers(error)
                raise

    # -- the scheduler --------------------------------------------------------------------------

    def _call_unit(self, events: Mapping[int, _Call]) -> dict[int, Any]:
        """Call the unit that all callers wait at, once; return the output of each."""
        unit = next(iter(events.values())).unit
        assert all(isinstance(e, _Call) and e.unit is unit for e in events.values()), (
            "callers are at different modules: their models compute in another order"
        )

        def compute(*inputs: Any) -> tuple[Any, ...]:
            inner = self._resume_all(dict(zip(events, inputs, strict=True)))
            while isinstance(next(iter(inner.values())), _Call):
                inner = self._resume_all(self._call_unit(inner))
            return tuple(event.value for event in inner.values())

        own = vars(unit)
        before = own.get("forward")
        own["forward"] = compute  # the instance's, so that hooks run around it
        try:
            outputs = unit._call_impl(*_join_gradients([event.inputs for event in events.values()]))
        finally:
            own.pop("forward")
            if before is not None:
                own["forward"] = before
        return dict(zip(events, outputs, strict=True))

    def _resume_all(self, answers: Mapping[int, Any]) -> dict[int, Any]:
        return {number: self._resume(number, answer) for number, answer in answers.items()}

    def _resume(self, number: int, answer: Any) -> Any:
        """Let a caller run until it waits again; return with which event."""
        caller = self._callers[number]
        caller.answer = answer
        with self._enter_share(number), _forwards_of(caller, self._units):
            caller.may_run.release()
            caller.has_stopped.acquire()
        if isinstance(caller.event, _Failure):
            raise caller.event.error
        return caller.event

    def _stop_callers(self, error: BaseException) -> None:
        """Raise ``error`` in callers that wait, for their own cleanup."""
        for caller in self._callers.values():
            while caller.thread is not None and caller.thread.is_alive():
                caller.answer = _Failure(error)
                caller.may_run.release()
                caller.has_stopped.acquire()
                if isinstance(caller.event, _Failure | _End):
                    break

    # -- a caller -------------------------------------------------------------------------------

    def _start_caller(self, number: int, call: Callable[[], Any]) -> None:
        caller, is_enabled = self._callers[number], torch.is_grad_enabled()
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def compute() -> None:
            caller.may_run.acquire()
            _callers.own = caller
            try:
                if device is not None:
                    torch.cuda.set_device(device)
                with torch.set_grad_enabled(is_enabled):
                    _raise_failure(caller.answer)
                    caller.event = _End(call())
            except BaseException as error:
                caller.event = _Failure(error)
            finally:
                caller.has_stopped.release()

        caller.thread = threading.Thread(target=compute, name=f"caller {number}", daemon=True)
        caller.thread.start()

    @contextmanager
    def _units_waiting(self) -> Iterator[None]:
        """Within the context, a caller that calls a unit waits for the others there."""
        for unit in self._units:
            assert unit._compiled_call_impl is None, "a compiled module"
            # in the place of torch.compile's call: hooks are of the call that the scheduler makes
            unit._compiled_call_impl = _Waiting(unit)
        try:
            yield
        finally:
            for unit in self._units:
                unit._compiled_call_impl = None


class _Together(torch.autograd.Function):
    """Tensors as they are; backward passes no gradient on before it has all of them, so that it
    leaves a unit when all callers have."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


def _join_gradients(inputs: Sequence[Any]) -> Sequence[Any]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map_gradients(inputs, note)
    if not found:
        return inputs
    joined = iter(_Together.apply(*found))
    changed: Sequence[Any] = _map_gradients(inputs, lambda tensor: next(joined))
    return changed


def _map_gradients(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return ``value`` with ``change`` of each tensor in it that requires a gradient."""
    if isinstance(value, Tensor):
        return change(value) if value.requires_grad else value
    if type(value) in (tuple, list):
        return type(value)(_map_gradients(item, change) for item in value)
    if type(value) is dict:
        return {key: _map_gradients(item, change) for key, item in value.items()}
    return value


class _Waiting:
    """The call of a unit."""

    def __init__(self, unit: nn.Module) -> None:
        self._unit = unit

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        caller: _Caller | None = getattr(_callers, "own", None)
        if caller is None:  # such as a recomputation
            return self._unit._call_impl(*args, **keywords)
        forward = self._unit.forward
        inputs, keywords = _wait(caller, _Call(self._unit, forward, (args, keywords)))
        return _wait(caller, _Output(forward(*inputs, **keywords)))


def _wait(caller: _Caller, event: Any) -> Any:
    """Wait with ``event``, and return the scheduler's answer."""
    caller.event = event
    caller.has_stopped.release()
    caller.may_run.acquire()
    _raise_failure(caller.answer)
    return caller.answer


def _raise_failure(answer: Any) -> None:
    if isinstance(answer, _Failure):
        raise answer.error


@contextmanager
def _forwards_of(caller: _Caller, units: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context, units have the ``forward`` that this caller has given them.

    A caller that computes losses in the head replaces the head's for its pass
    (``train.head_loss``); the other callers have other labels.
    """
    before = {unit: vars(unit).get("forward") for unit in units}
    for unit, forward in caller.own_forwards.items():
        vars(unit)["forward"] = forward
    yield
    known, caller.own_forwards = caller.own_forwards, {}
    for unit, others in before.items():
        now = vars(unit).pop("forward", None)
        if now is not None and (unit in known or now is not others):
            caller.own_forwards[unit] = now
        if others is not None:
            vars(unit)["forward"] = others
