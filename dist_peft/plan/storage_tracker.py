"""Live tensor storage, by phase of a step and by purpose.

A mode sees every operator that runs inside it and, of each output, the storage. A storage counts
from the operator that made it until Python frees it; resizing (with which engines free gathered
bytes) counts at once. Fake and real tensors are treated alike: the same tracker measures a planned
step and a real one.

Not seen: memory inside a kernel, and the rounding and fragmentation of an allocator.
"""

import sys
import weakref
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from types import CodeType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dist_peft.engine.compat import watch_storage_resizes

__all__ = ["HOST", "Peak", "StorageTracker", "list_storages"]

HOST = "host"
"""Purpose of tensors that stand for copies in host memory; no total counts them."""

_PURPOSES: tuple[tuple[str, str], ...] = (
    ("dist_peft/engine/row_shards.py", "gathered"),
    ("dist_peft/engine/routed_gather.py", "gathered"),
    ("_fully_shard/_fsdp_collectives.py", "gathered"),
    ("_fully_shard/_fsdp_param.py", "gathered"),
    ("dist_peft/quant/kernels.py", "dequantized"),
    ("dist_peft/quant/codec.py", "dequantized"),
    ("dist_peft/quant/nf4.py", "dequantized"),
    ("dist_peft/quant/affine.py", "dequantized"),
    ("dist_peft/quant/pack.py", "dequantized"),
    ("dist_peft/train/loss.py", "logits"),
    ("dist_peft/train/head_loss.py", "logits"),
    ("torch/optim/", "optimizer"),
    ("dist_peft/engine/optimizer.py", "optimizer"),
    ("bitsandbytes/optim/", "optimizer"),
    ("deepspeed/", "deepspeed"),
    ("torch/autograd/__init__.py", ""),
)
"""Part of a source file's path -> purpose of the tensors that it makes; the innermost call counts.
Without one: that of the phase."""

_ALLOCATING, _REDUCING = "allocate", {"foreach_reduce", "to_accumulated_grad_if_needed"}
"""Functions in which an engine or FSDP2 makes buffers of other kinds than their file's."""

_DEEPEST = 60


class Peak:
    """The largest live storage of a phase, in bytes.

    Attributes:
        total: of all tensors.
        by_purpose: purpose -> bytes, at that moment.
    """

    def __init__(self, total: int, by_purpose: Mapping[str, int]) -> None:
        self.total, self.by_purpose = total, dict(by_purpose)


class _Known:
    """A live storage."""

    def __init__(self, reference: Any, size: int, purpose: str, phase: str) -> None:
        self.reference, self.size = reference, size
        self.purpose, self.phase = purpose, phase


class StorageTracker(TorchDispatchMode):
    """Counts the live storage of tensors made inside it, and of those added to it.

    Attributes:
        phase: name under which peaks are kept; set it as the step proceeds.
        peaks: phase -> its peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, _Known] = {}
        self._sums: dict[str, int] = {}
        self.total = 0
        self.phase = "start"
        self.peaks: dict[str, Peak] = {}
        self._resizes = ExitStack()

    # -- what is live --------------------------------------------------------------------------

    def add_tensors(self, tensors: Iterable[Tensor], purpose: str) -> None:
        """Count the storages of existing tensors; a storage counts once."""
        for storage in list_storages(tensors):
            self._add_storage(storage, purpose)

    @property
    def live_by_purpose(self) -> dict[str, int]:
        """Purpose -> bytes, now."""
        return {purpose: size for purpose, size in self._sums.items() if size and purpose != HOST}

    @property
    def host_bytes(self) -> int:
        """Bytes of copies in host memory, now."""
        return self._sums.get(HOST, 0)

    def relabel_phase(self, phase: str, purpose: str, only: Iterable[str]) -> None:
        """Give the live storages that were made in ``phase`` for one of ``only`` a new purpose."""
        wanted = set(only)
        for known in self._known.values():
            if known.phase == phase and known.purpose in wanted:
                self._sums[known.purpose] -= known.size
                self._sums[purpose] = self._sums.get(purpose, 0) + known.size
                known.purpose = purpose

    def enter_phase(self, phase: str) -> None:
        """Peaks count for ``phase`` from now on."""
        self.phase = phase
        self._note_peak()

    def run_operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator; its result is counted."""
        return func(*args, **kwargs)

    # -- the mode ------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._resizes.enter_context(watch_storage_resizes(self._change_size))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._resizes.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = self.run_operator(func, args, kwargs or {})
        purpose = ""
        for storage in list_storages(tree_iter(result)):
            if id(storage) not in self._known:
                purpose = purpose or _find_purpose() or self.phase.partition(" ")[0]
                self._add_storage(storage, purpose)
            elif self._known[id(storage)].size != storage.nbytes():
                self._change_size(storage)
        return result

    def _add_storage(self, storage: torch.UntypedStorage, purpose: str) -> None:
        key = id(storage)
        if key in self._known:
            return

        def forget_storage(_: Any) -> None:
            gone = self._known.pop(key, None)
            if gone is not None:
                self._change_sum(gone.purpose, -gone.size)

        reference = weakref.ref(storage, forget_storage)
        self._known[key] = _Known(reference, 0, purpose, self.phase)
        self._change_size(storage)

    def _change_size(self, storage: torch.UntypedStorage) -> None:
        known = self._known.get(id(storage))
        if known is not None:
            size = storage.nbytes()
            change, known.size = size - known.size, size
            self._change_sum(known.purpose, change)

    def _change_sum(self, purpose: str, change: int) -> None:
        self._sums[purpose] = self._sums.get(purpose, 0) + change
        if purpose == HOST:
            return
        self.total += change
        if change > 0:
            self._note_peak()

    def _note_peak(self) -> None:
        peak = self.peaks.get(self.phase)
        if peak is None or self.total > peak.total:
            self.peaks[self.phase] = Peak(self.total, self.live_by_purpose)


def list_storages(tensors: Iterable[Any]) -> list[torch.UntypedStorage]:
    """Return the storages of ``tensors``; of a DTensor that of this rank's part. Others: none."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        tensor = getattr(tensor, "_local_tensor", tensor)
        if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            found[id(storage)] = storage
    return list(found.values())


def _find_purpose() -> str:
    """Return the purpose of a tensor by the source files on the stack, innermost first."""
    frame = sys._getframe(2)
    for _ in range(_DEEPEST):
        if frame is None:
            break
        code = frame.f_code
        if code not in _BY_CODE:
            _BY_CODE[code] = _find_code_purpose(code.co_filename, code.co_name)
        if (purpose := _BY_CODE[code]) is not None:
            return purpose
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def _find_code_purpose(file: str, function: str) -> str | None:
    if function in _REDUCING:
        return "gradients"
    if function == "copy_to_host":
        return HOST
    if (
        function == _ALLOCATING and "fsdp" in file
    ):  # ours for all-gathers, FSDP2's own for reduce-scatters
        return "gathered" if file.endswith("dist_peft/engine/fsdp2.py") else "gradients"
    return next((purpose for part, purpose in _PURPOSES if part in file), None)


_BY_CODE: dict[CodeType, str | None] = {}
