"""Frozen parameters sharded along rows by this project itself, next to any optimizer.

DeepSpeed partitions parameters as flat elements, broadcasts its input from rank 0, and
counts on float types. The frozen base needs none of that: it has no gradient and no optimizer
state, only bytes that must be whole while a block computes. So it is kept here, where no engine
sees it::

    rest       rank r has rows [r*c, r*c + c) of each parameter, c = ceil(rows / ranks), as bytes:
               | q_proj | k_proj | ... | norm |   one flat uint8 buffer a unit
    gather     one all-gather of that buffer a unit; rows are copied to each parameter's place
    release    the parameter's storage is resized to nothing; object, shape and views stay

A unit is a decoder block, the embedding, the head, or (the root) the rest. Hooks gather a unit
before its forward and, for backward, when the gradient of its output arrives; the neighbour that
comes next is gathered meanwhile. At most two blocks are whole at any time, and those that are kept
for good (``keep_gathered``). Between forward and
backward a block's bytes are freed, which autograd does not notice: the storage is resized, as FSDP2
does it (torch/distributed/fsdp/_fully_shard), and written through an alias with a version counter
of its own.

Packed rows are gathered as stored: scales inside, nothing dequantized, any dtype, uneven rows.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from dist_peft.core.span import Span, row_span
from dist_peft.engine.compat import all_gather
from dist_peft.engine.mesh import list_end_modules

__all__ = ["RowShardedParameters"]

_ALIGN = 16
"""Bytes: every parameter starts at a multiple, so that its rows can be viewed in its own type."""


class _ShardedParameter:
    """One parameter: this rank's rows as bytes, and the place where it becomes whole."""

    def __init__(self, meta: nn.Parameter, parts: int) -> None:
        self.parameter = meta
        self.shape, self.dtype, self.requires_grad = meta.shape, meta.dtype, meta.requires_grad
        self.nbytes = meta.numel() * meta.element_size()
        rows = -(-meta.shape[0] // parts)
        self.part = self.nbytes // meta.shape[0] * rows if meta.shape[0] else 0
        self.local = torch.empty(0, dtype=torch.uint8)
        self.bytes = self.local

    def fill_local_rows(self, rows: Tensor) -> nn.Parameter:
        """Store ``rows`` and return the parameter, whole in shape and empty in storage."""
        data = rows.contiguous().view(-1).view(torch.uint8)
        self.local[: data.numel()].copy_(data)
        flat = torch.empty(self.nbytes, dtype=torch.uint8, device=self.local.device)
        whole = flat.view(self.dtype).view(self.shape)
        self.bytes = flat.data  # writing through it does not count as a change of the parameter
        self.parameter = nn.Parameter(whole, requires_grad=self.requires_grad)
        self.free_full_tensor()
        return self.parameter

    def scatter_chunks(self, chunks: Tensor) -> None:
        """``chunks`` [parts, part]: each rank's rows, the last ones padded."""
        # the storage object stays: views that autograd saved in forward see the bytes again
        self.bytes.untyped_storage().resize_(self.nbytes)
        if not self.nbytes:
            return
        full, rest = divmod(self.nbytes, self.part)
        self.bytes[: full * self.part].view(full, self.part).copy_(chunks[:full])
        if rest:
            self.bytes[full * self.part :].copy_(chunks[full, :rest])

    def free_full_tensor(self) -> None:
        self.bytes.untyped_storage().resize_(0)


class _GatherUnit:
    """Slots that travel in one all-gather."""

    def __init__(
        self,
        slots: Sequence[_ShardedParameter],
        owner: "RowShardedParameters",
        needed_in_backward: bool,
        kept: bool,
        used_at_turn: bool,
    ) -> None:
        self.slots, self.owner, self.needed_in_backward = slots, owner, needed_in_backward
        self.kept, self.used_at_turn = kept, used_at_turn
        self.offsets, size = [], 0
        for slot in slots:
            self.offsets.append(size)
            size += -(-slot.part // _ALIGN) * _ALIGN
        self.local = torch.zeros(size, dtype=torch.uint8, device=owner.device)
        for slot, offset in zip(slots, self.offsets, strict=True):
            slot.local = self.local[offset : offset + slot.part]
        self.whole = False
        self.has_backward = False
        self.pending: tuple[Tensor, dist.Work | None] | None = None

    def start_all_gather(self) -> None:
        """Begin to gather, unless that is done or under way."""
        if not self.whole and self.pending is None and self.slots:
            self.pending = self.owner.all_gather_chunks(self.local)

    def wait_gathered(self) -> None:
        """Wait for the all-gather and set the full parameters."""
        self.start_all_gather()
        if self.pending is None:
            return
        output = self._copy_gathered_chunks()
        for slot, offset in zip(self.slots, self.offsets, strict=True):
            slot.scatter_chunks(output[:, offset : offset + slot.part])
        self.whole = True

    def release_full_tensors(self) -> None:
        """Free them after use, unless they are kept."""
        if not self.kept:
            self.free_full_tensors()

    def free_full_tensors(self) -> None:
        if self.pending is not None:
            self._copy_gathered_chunks()  # wait for it: the collective still writes its output
        if self.whole:
            for slot in self.slots:
                slot.free_full_tensor()
        self.whole = False

    def _copy_gathered_chunks(self) -> Tensor:
        assert self.pending is not None
        output, work = self.pending
        self.pending = None
        if work is not None:
            work.wait()
        return output.view(self.owner.parts, -1)


class RowShardedParameters:
    """The rows of a model's parameters over the ranks of ``group``, gathered unit by unit.

    Frozen parameters live in units. Trainable ones are only loaded this way, each rank its own
    rows; before the first forward they become whole (``unshard_trainable``) and the caller's
    business.

    Args:
        group: the ranks that together hold one copy.
        device: where rows rest and are gathered.
        keep_gathered: number of blocks, from the first on, that stay whole once they have been
            gathered: frozen rows do not change.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, keep_gathered: int = 0
    ) -> None:
        self.group, self.device, self.keep_gathered = group, device, keep_gathered
        self.parts, self.index = group.size(), group.rank()
        self.bytes_gathered = 0
        self._slots: dict[int, _ShardedParameter] = {}
        self._units: list[_GatherUnit] = []
        self._blocks: list[_GatherUnit] = []
        self._ending = False

    # -- filling -------------------------------------------------------------------------------

    def shard_model(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Plan the shards of ``model`` (parameters on meta) and hook its modules."""
        ends = list_end_modules(model)
        modules = [*blocks, *ends, model]
        homes: dict[int, list[int]] = {}
        parameters = {id(p): p for p in model.parameters()}
        for number, module in enumerate(modules[:-1]):
            for parameter in set(module.parameters()):
                homes.setdefault(id(parameter), []).append(number)
        members: list[list[_ShardedParameter]] = [[] for _ in modules]
        for key, parameter in parameters.items():
            slot = self._slots[key] = _ShardedParameter(parameter, self.parts)
            if slot.requires_grad:
                slot.local = torch.zeros(slot.part, dtype=torch.uint8, device=self.device)
            else:  # a parameter shared by units stays whole with the root
                home = homes.get(key, [])
                members[home[0] if len(home) == 1 else -1].append(slot)
        lookup = ends[:1]  # a frozen embedding needs no rows in backward
        self._units = [
            _GatherUnit(
                slots,
                self,
                module not in lookup,
                kept=n < min(len(blocks), self.keep_gathered),
                used_at_turn=module in ends[1:] or module is model,
            )
            for n, (slots, module) in enumerate(zip(members, modules, strict=True))
        ]
        self._blocks = self._units[: len(blocks)]
        for number, (unit, module) in enumerate(zip(self._units, modules, strict=True)):
            self._register_hooks(module, unit, number, is_root=module is model)

    def is_row_sharded(self, parameter: Tensor) -> bool:
        return id(parameter) in self._slots

    def local_row_span(self, parameter: Tensor) -> Span:
        return row_span(parameter.shape[0], self.parts, self.index)

    def fill_local_rows(self, owner: nn.Module, name: str, rows: Tensor) -> None:
        """Put this rank's rows into ``owner.name``."""
        old = owner._parameters[name]
        assert old is not None and rows.dtype == old.dtype and rows.shape[1:] == old.shape[1:]
        assert len(rows) == len(self.local_row_span(old)), (
            f"{name}: {len(rows)} rows for {self.local_row_span(old)}"
        )
        slot = self._slots.pop(id(old))
        for unit in self._units:
            if unit.kept and unit.whole and slot in unit.slots:
                unit.free_full_tensors()  # gathered again with the new rows
        new = slot.fill_local_rows(rows.to(self.device))
        self._slots[id(new)] = slot
        owner.register_parameter(name, new)

    def unshard_trainable(self) -> None:
        """Gather the trainable parameters for good; they are no longer sharded here."""
        for key, slot in list(self._slots.items()):
            if slot.requires_grad:
                slot.scatter_chunks(self._padded_chunks(slot))
                del self._slots[key]

    def gather_parameter(self, parameter: Tensor) -> Tensor:
        """The whole of one frozen parameter, without gathering its unit."""
        slot = self._slots[id(parameter)]
        flat = self._padded_chunks(slot).flatten()[: slot.nbytes]
        return flat.view(slot.dtype).view(slot.shape)

    def _padded_chunks(self, slot: _ShardedParameter) -> Tensor:
        output, work = self.all_gather_chunks(slot.local)
        if work is not None:
            work.wait()
        return output.view(self.parts, -1)

    def all_gather_chunks(self, local: Tensor) -> tuple[Tensor, "dist.Work | None"]:
        """Begin an all-gather of ``local`` [n] -> [parts * n], and count it."""
        output = torch.empty(self.parts * local.numel(), dtype=local.dtype, device=local.device)
        self.bytes_gathered += output.numel()
        return output, all_gather(output, local, group=self.group, async_op=True)

    # -- computing -----------------------------------------------------------------------------

    def _register_hooks(
        self, module: nn.Module, unit: _GatherUnit, number: int, is_root: bool
    ) -> None:
        following = self._blocks[number + 1 : number + 2] if number < len(self._blocks) else []
        previous = self._blocks[number - 1 : number] if number < len(self._blocks) else []

        def before_forward(module: nn.Module, inputs: Any) -> None:
            if is_root:
                self.unshard_trainable()  # an evaluation sets up no optimizer, which does it
            unit.wait_gathered()
            for other in following:
                other.start_all_gather()

        def after_forward(module: nn.Module, inputs: Any, output: Any) -> None:
            grads = [t for t in _iterate_tensors(output) if t.requires_grad]
            # without a gradient of its output, backward has no use for its bytes
            unit.has_backward = bool(grads) and unit.needed_in_backward
            # the root is used at both ends of a step, the head where forward turns to backward
            if not (grads and unit.used_at_turn):
                unit.release_full_tensors()
            if unit.has_backward and not is_root:
                for tensor in grads:
                    tensor.register_hook(before_backward)

        def before_backward(grad: Tensor) -> None:
            if not self._ending:
                self._ending = True  # no hook fires after the first block's backward
                Variable._execution_engine.queue_callback(self._finish_backward)
            for other in self._units[:-1]:
                if other is not unit and other.whole:
                    # its backward is over: otherwise the backward of this one would not run
                    other.release_full_tensors()
            unit.wait_gathered()
            for other in previous:
                if other.has_backward:
                    other.start_all_gather()

        module.register_forward_pre_hook(before_forward)
        module.register_forward_hook(after_forward)

    def _finish_backward(self) -> None:
        self._ending = False
        for unit in self._units:
            unit.release_full_tensors()


def _iterate_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a module's output, however they are nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _iterate_tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _iterate_tensors(item)
