"""Frozen parameters sharded along rows by this project itself, next to any optimizer.

DeepSpeed partitions parameters as flat elements, broadcasts its input from rank 0, and
counts on float types. The frozen base needs none of that: it has no gradient and no optimizer
state, only bytes that must be whole while a block computes. So it is kept here, where no engine
sees it::

    rest       rank r has rows [r*c, r*c + c) of each parameter, c = ceil(rows / ranks), as bytes:
               | q_proj | k_proj | ... | norm |   one flat uint8 buffer a unit
    gather     one all-gather of that buffer a unit; rows are copied to each parameter's place
    release    the parameter's storage is resized to nothing; object, shape and views stay

A unit is a decoder block, one of ``engine.outer_units`` (embedding, head, ...), or (the root) the
rest. Hooks gather a unit before its forward and, for backward, when the gradient of its output
arrives; the block that comes next is gathered meanwhile. At most two blocks are whole at any time,
and those that are kept for good (``keep_gathered``). Between forward and backward a unit's bytes
are freed, which autograd does not notice: the storage is resized, as FSDP2 does it
(torch/distributed/fsdp/_fully_shard), and written through an alias with a version counter of its
own.

Large parameters outside of the blocks are gathered in place (``engine.gather_unit``), so that there
is never a buffer next to a whole head. Of an embedding on a CPU only the rows of the tokens are
gathered (``engine.embedding_rows``).

Packed rows are gathered as stored: scales inside, nothing dequantized, any dtype, uneven rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from dist_peft.core.config.engine import EngineConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.engine.chunk_gather import all_gather_chunks
from dist_peft.engine.embedding_rows import can_look_up_rows, register_lookup_hooks
from dist_peft.engine.gather_unit import GatherUnit, ShardedParameter
from dist_peft.engine.mesh import list_end_modules
from dist_peft.engine.outer_units import MIN_UNIT_BYTES, OuterUnit, list_outer_units
from dist_peft.engine.routed_gather import RoutedUnit, register_routed_hooks
from dist_peft.engine.token_exchange import OwnedStack, TokenExchange
from dist_peft.model.experts import ExpertStack, FrozenExperts
from dist_peft.model.parameter_readers import list_unread_parameters

__all__ = ["ExpertChoice", "RowShardedParameters"]

ExpertChoice = Literal["all", "routed", "tokens"]
"""Values of ``engine.gather_experts``."""


class RowShardedParameters:
    """The rows of a model's parameters over the ranks of ``group``, gathered unit by unit.

    Frozen parameters live in units. Trainable ones are only loaded this way, each rank its own
    rows; before the first forward they become whole (``unshard_trainable``) and the caller's
    business. Parameters that nothing reads
    (``model.parameter_readers``) are left out.

    Args:
        group: the ranks that together hold one copy.
        device: where rows are gathered.
        keep_gathered: number of blocks, from the first on, that stay whole once they have been
            gathered: frozen rows do not change.
        resting_device: where rows rest, by default ``device``.
        experts: all are gathered with their block; or ``routed`` ones (``engine.routed_gather``);
            or none, as ``tokens`` travel (``engine.token_exchange``).
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        keep_gathered: int = 0,
        resting_device: torch.device | None = None,
        experts: ExpertChoice = "all",
    ) -> None:
        self.group, self.device, self.keep_gathered = group, device, keep_gathered
        self.resting_device = resting_device or device
        self.parts, self.index = group.size(), group.rank()
        self.bytes_gathered = 0
        self._slots: dict[int, ShardedParameter] = {}
        self.experts: ExpertChoice = experts
        self._outer: list[GatherUnit] = []
        self._routed: list[RoutedUnit] = []
        self._owned: list[OwnedStack] = []
        self._blocks: list[GatherUnit] = []
        self._root: list[GatherUnit] = []
        self._ending = False

    @classmethod
    def from_config(
        cls, config: EngineConfig, group: dist.ProcessGroup, device: torch.device
    ) -> "RowShardedParameters":
        """Make them for a whole model as section ``engine`` says."""
        return cls(group, device, config.keep_gathered, experts=config.gather_experts)

    # -- filling -------------------------------------------------------------------------------

    def shard_model(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Plan the shards of ``model`` (parameters on meta) and hook its modules."""
        self.shard_outer_units(model)
        if self.experts != "all":
            self.shard_experts(blocks)
        unread = list_unread_parameters(model)
        homes: dict[int, list[int]] = {}
        for number, block in enumerate(blocks):
            for parameter in set(block.parameters()):
                homes.setdefault(id(parameter), []).append(number)
        members: list[list[ShardedParameter]] = [[] for _ in [*blocks, model]]
        for parameter in model.parameters():
            key = id(parameter)
            if key in self._slots or key in unread:
                continue
            slot = self._slots[key] = ShardedParameter(parameter, self.parts)
            if slot.requires_grad:
                slot.local = self.allocate_resting(slot.part)
            else:  # a parameter shared by blocks stays whole with the root
                home = homes.get(key, [])
                members[home[0] if len(home) == 1 else -1].append(slot)
        *block_members, rest = members
        self._blocks = [
            GatherUnit(slots, self, kept=number < self.keep_gathered)
            for number, slots in enumerate(block_members)
        ]
        self._root = [GatherUnit(rest, self)]
        for number, (unit, block) in enumerate(zip(self._blocks, blocks, strict=True)):
            self._register_block_hooks(block, unit, number)
        self._register_block_hooks(model, self._root[0], None)

    def shard_outer_units(self, model: nn.Module) -> list[nn.Parameter]:
        """Plan the shards of the units outside of the blocks alone; return their parameters."""
        units = list_outer_units(model)
        for unit in units:
            self._shard_outer_unit(unit, model)
        return [parameter for unit in units for parameter in unit.parameters]

    def _shard_outer_unit(self, unit: OuterUnit, model: nn.Module) -> None:
        embedding, *heads = list_end_modules(model)
        slots, in_place = [], []
        for parameter in unit.parameters:
            size = parameter.numel() * parameter.element_size()
            alone = len(unit.parameters) == 1 or size >= MIN_UNIT_BYTES
            slot = ShardedParameter(parameter, self.parts, in_place=alone)
            self._slots[id(parameter)] = slot
            slots.append(slot)
            in_place += [slot] if alone else []
        gathered = GatherUnit(slots, self, in_place)
        self._outer.append(gathered)
        for module in unit.modules:
            if len(slots) == 1 and can_look_up_rows(module, embedding):
                register_lookup_hooks(module, gathered, self)
            else:
                self._register_outer_hooks(module, gathered, is_head=module in heads)

    def shard_experts(self, blocks: Sequence[nn.Module]) -> list[nn.Parameter]:
        """Plan the shards of the blocks' experts alone; return their stacks.

        Raises:
            UserError: there are none.
        """
        found: list[nn.Parameter] = []
        for block in blocks:
            for module in block.modules():
                if not isinstance(module, FrozenExperts) or not module.is_routed:
                    continue
                stacks = [m for m in module.modules() if isinstance(m, ExpertStack)]
                if self.experts == "tokens":
                    slots = self._own_experts(module, stacks)
                else:
                    slots = self._route_experts(block, module, stacks)
                packed = [stack.packed for stack in stacks]
                self._slots |= {id(p): slot for p, slot in zip(packed, slots, strict=True)}
                found += packed
        if not found:
            raise UserError(
                f"engine.gather_experts: {self.experts} is for mixtures of experts, and base.path "
                "is none; leave it out"
            )
        return found

    def _route_experts(
        self, block: nn.Module, module: FrozenExperts, stacks: Sequence[ExpertStack]
    ) -> Sequence[ShardedParameter]:
        slots = [ShardedParameter(stack.packed, self.parts) for stack in stacks]
        unit = RoutedUnit(slots, module.num_experts, self)
        previous = self._routed[-1] if self._routed else None
        register_routed_hooks(block, module, unit, previous)
        self._routed.append(unit)
        return slots

    def _own_experts(
        self, module: FrozenExperts, stacks: Sequence[ExpertStack]
    ) -> Sequence[ShardedParameter]:
        slots = [OwnedStack(stack, self) for stack in stacks]
        module.exchange = TokenExchange(module, self)
        self._owned += slots
        return slots

    def allocate_resting(self, size: int) -> Tensor:
        """Return bytes where rows rest; bytes not filled are padding, never read."""
        pins = self.resting_device.type == "cpu" and self.device.type == "cuda"
        return torch.empty(size, dtype=torch.uint8, device=self.resting_device, pin_memory=pins)

    @property
    def _units(self) -> list[GatherUnit | RoutedUnit]:
        return [*self._blocks, *self._routed, *self._outer, *self._root]

    @property
    def resting_tensors(self) -> list[Tensor]:
        """The rows of this rank, as bytes, unit by unit, padding included."""
        routed = [tensor for unit in self._routed for tensor in unit.resting_tensors]
        routed += [slot.local for slot in self._owned]
        units = [*self._blocks, *self._outer, *self._root]
        return [*(unit.local for unit in units), *routed]

    def get_local_bytes(self, parameter: Tensor) -> Tensor:
        """Return this rank's rows of a parameter, as bytes."""
        slot = self._slots[id(parameter)]
        return slot.local[: len(self.local_row_span(parameter)) * slot.row_bytes]

    def is_row_sharded(self, parameter: Tensor) -> bool:
        return id(parameter) in self._slots

    def local_row_span(self, parameter: Tensor) -> Span:
        return self._slots[id(parameter)].get_row_span(self.index)

    def fill_local_rows(self, owner: nn.Module, name: str, rows: Tensor) -> None:
        """Put this rank's rows into ``owner.name``."""
        old = owner._parameters[name]
        assert old is not None and rows.dtype == old.dtype and rows.shape[1:] == old.shape[1:]
        assert len(rows) == len(self.local_row_span(old)), (
            f"{name}: {len(rows)} rows for {self.local_row_span(old)}"
        )
        slot = self._slots.pop(id(old))
        self._free_gathered(slot)
        new = slot.fill_local_rows(rows.to(self.resting_device), self.device)
        self._slots[id(new)] = slot
        owner.register_parameter(name, new)

    def overwrite_local_rows(self, parameter: Tensor, rows: Tensor) -> None:
        """Replace this rank's rows of a frozen parameter, whose object stays."""
        slot = self._slots[id(parameter)]
        assert rows.dtype == slot.dtype and len(rows) == len(self.local_row_span(parameter))
        data = rows.contiguous().view(-1).view(torch.uint8)
        self._free_gathered(slot)
        slot.local[: data.numel()].copy_(data)

    def _free_gathered(self, slot: ShardedParameter) -> None:
        """Let a unit that is whole be gathered again, with the new rows of ``slot``."""
        for unit in self._units:
            if slot in unit.slots and (unit.whole or unit.pending is not None):
                unit.free_full_tensors()

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

    def _padded_chunks(self, slot: ShardedParameter) -> Tensor:
        output, work = self.all_gather_chunks(slot.local)
        if work is not None:
            work.wait()
        return output.view(self.parts, -1)

    def all_gather_chunks(
        self, local: Tensor, output: Tensor | None = None
    ) -> tuple[Tensor, "dist.Work | None"]:
        """Begin an all-gather of ``local`` [n] -> ``output`` [parts * n], and count it."""
        local = local.to(self.device, non_blocking=True)
        if output is None:
            size = self.parts * local.numel()
            output = torch.empty(size, dtype=local.dtype, device=self.device)
        self.bytes_gathered += output.numel()
        return output, all_gather_chunks(output, local, self.group, async_op=True)

    # -- computing -----------------------------------------------------------------------------

    def _register_block_hooks(
        self, module: nn.Module, unit: GatherUnit, number: int | None
    ) -> None:
        """Hook a block, or the root, which has no number."""
        is_root = number is None
        following = [] if number is None else self._blocks[number + 1 : number + 2]
        previous = [] if number is None else self._blocks[max(0, number - 1) : number]

        def before_forward(module: nn.Module, inputs: Any) -> None:
            if is_root:
                self.unshard_trainable()  # an evaluation sets up no optimizer, which does it
            unit.wait_gathered()
            for other in following:
                other.start_all_gather()

        def after_forward(module: nn.Module, inputs: Any, output: Any) -> None:
            grads = [t for t in _iterate_tensors(output) if t.requires_grad]
            # without a gradient of its output, backward has no use for its bytes
            unit.has_backward = bool(grads)
            # the root is used at both ends of a step
            if not (grads and is_root):
                unit.release_full_tensors()
            if grads and not is_root:
                for tensor in grads:
                    tensor.register_hook(before_backward)

        def before_backward(grad: Tensor) -> None:
            self._finish_after_backward()
            for other in self._blocks:
                if other is not unit and other.whole:
                    # its backward is over: otherwise the backward of this one would not run
                    other.release_full_tensors()
            unit.wait_gathered()
            for other in previous:
                if other.has_backward:
                    other.start_all_gather()

        module.register_forward_pre_hook(before_forward)
        module.register_forward_hook(after_forward)

    def _register_outer_hooks(self, module: nn.Module, unit: GatherUnit, is_head: bool) -> None:
        """Hook a module of a unit outside of the blocks; others may share it or contain it."""

        def before_forward(module: nn.Module, inputs: Any) -> None:
            unit.calls += 1
            unit.wait_gathered()

        def after_forward(
            module: nn.Module, inputs: Any, keywords: Mapping[str, Any], output: Any
        ) -> None:
            unit.calls -= 1
            grads = [t for t in _iterate_tensors(output) if t.requires_grad]
            # forward turns to backward at the head: it is gathered once for both
            if not unit.calls and not (grads and is_head):
                unit.free_full_tensors()
            for tensor in grads:
                tensor.register_hook(before_backward)
            if grads:
                found = _iterate_tensors((inputs, dict(keywords)))
                release_after_backward([t for t in found if t.requires_grad])

        def before_backward(grad: Tensor) -> None:
            self._finish_after_backward()
            unit.wait_gathered()

        def release_after_backward(inputs: list[Tensor]) -> None:
            """The module's backward is over when all its inputs have their gradients."""
            missing = len(inputs)

            def note_gradient(grad: Tensor) -> None:
                nonlocal missing
                missing -= 1
                if not missing:
                    unit.free_full_tensors()

            for tensor in inputs:
                tensor.register_hook(note_gradient)

        module.register_forward_pre_hook(before_forward)
        module.register_forward_hook(after_forward, with_kwargs=True, always_call=True)

    def _finish_after_backward(self) -> None:
        """Let the end of this backward free what no hook does, such as the first block."""
        if not self._ending:
            self._ending = True
            Variable._execution_engine.queue_callback(self._finish_backward)

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
