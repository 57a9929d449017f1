"""Inputs of checkpointed blocks in host memory, from forward to backward.

With activation checkpointing a micro-batch keeps the input of each of ``L`` blocks, ``L B S H``
numbers: 2 GiB for 64 blocks of width 8192 with 2048 tokens. Each is used once, long after, and so
can wait in host memory::

    forward    block n-1 | block n         | block n+1
    copy out             | input of n      | input of n+1     own stream
    backward   block n+1 | block n         | block n-1
    copy in    input of n| input of n-1    |

A copy runs while a block computes. At most two inputs are on the device in each direction: that of
the present block, and the one whose copy is under way. Before an input's memory is used again the
computing stream waits for its copy, so that nothing else has to be recorded.

By ``saved_tensors_hooks`` this module gets the inputs that ``torch.utils.checkpoint`` saves,
and returns them in backward.
"""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["HostCopies", "InputOffload", "PinnedCopies", "PlainCopies"]


class HostCopies(Protocol):
    """Copies between a device and its host's memory, that may overlap with the computation."""

    def copy_to_host(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """Begin a copy; return it, and an argument for ``wait``."""
        ...

    def copy_to_device(self, host: Tensor) -> tuple[Tensor, Any]:
        """Begin a copy back; return it, and an argument for ``wait``."""
        ...

    def wait(self, copying: Any) -> None:
        """Let later kernels wait for a copy."""
        ...


class PinnedCopies:
    """Copies of a CUDA device, by a stream of their own through pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def copy_to_host(self, tensor: Tensor) -> tuple[Tensor, Any]:
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return host, self._copy(tensor, host)

    def copy_to_device(self, host: Tensor) -> tuple[Tensor, Any]:
        tensor = torch.empty_like(host, device=self.device)
        return tensor, self._copy(host, tensor)

    def _copy(self, source: Tensor, target: Tensor) -> torch.cuda.Event:
        """Copy behind all that is queued, and behind earlier copies."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            event: torch.cuda.Event = self._stream.record_event()
        return event

    def wait(self, copying: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(copying)


class PlainCopies:
    """Copies within one memory, done at once: those of a traced step, and of tests."""

    def copy_to_host(self, tensor: Tensor) -> tuple[Tensor, Any]:
        return tensor.detach().clone(), None

    def copy_to_device(self, host: Tensor) -> tuple[Tensor, Any]:
        return host.clone(), None

    def wait(self, copying: Any) -> None:
        pass


class _HeldInput:
    """An input in host memory, and on its way back once it was asked for."""

    def __init__(self, host: Tensor, previous: "_HeldInput | None") -> None:
        self.host = host
        self.previous = None if previous is None else weakref.ref(previous)
        self.incoming: tuple[Tensor, Any] | None = None


class InputOffload:
    """Inputs of the blocks of a model, of one micro-batch after the other.

    Args:
        copies: of the device.
    """

    def __init__(self, copies: HostCopies) -> None:
        self._copies = copies
        self._leaving: tuple[Tensor, Any] | None = None
        self._last: Callable[[], _HeldInput | None] = lambda: None

    def hold_inputs(self, hidden: Tensor) -> AbstractContextManager[Any]:
        """Return a context in which a checkpoint's inputs of the form of ``hidden`` are held."""
        shape, dtype = hidden.shape, hidden.dtype  # autograd keeps both functions

        def pack(tensor: Tensor) -> Any:
            if tensor.shape != shape or tensor.dtype != dtype:
                return tensor
            return self._send_input(tensor.detach())

        def unpack(held: Any) -> Tensor:
            return self._fetch_input(held) if isinstance(held, _HeldInput) else held

        return saved_tensors_hooks(pack, unpack)

    def _send_input(self, tensor: Tensor) -> _HeldInput:
        self._finish_sending()
        host, copying = self._copies.copy_to_host(tensor)
        self._leaving = (tensor, copying)
        held = _HeldInput(host, self._last())
        self._last = weakref.ref(held)
        return held

    def _fetch_input(self, held: _HeldInput) -> Tensor:
        """Return an input, and begin to copy the one that backward asks for next."""
        self._finish_sending()
        tensor, copying = self._start_fetching(held)
        held.incoming = None
        self._copies.wait(copying)
        before = held.previous() if held.previous is not None else None
        if before is not None:
            before.incoming = self._start_fetching(before)
        return tensor

    def _start_fetching(self, held: _HeldInput) -> tuple[Tensor, Any]:
        return held.incoming or self._copies.copy_to_device(held.host)

    def _finish_sending(self) -> None:
        """Give the memory of the input that was copied last free, behind its copy."""
        if self._leaving is not None:
            self._copies.wait(self._leaving[1])
            self._leaving = None
