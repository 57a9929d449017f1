"""One optimizer step of the real program on fake tensors, and its memory by phase.

Model, adapter, engine, recomputation and loss are those of a run; only the tensors are fake
(``torch._subclasses``: shapes and storage sizes without memory), the process group sends nothing
(``engine.fake_ranks``) and the model is cut down to a few blocks. Of a model of ``L`` equal blocks
two such steps, with ``k`` and ``k + 1`` blocks, tell how each phase grows with a block::

    embedding   tokens -> first block's input
    forward     blocks; with activation checkpointing each leaves its input
    head        norm, head, loss, and their backward pass, while all inputs are kept
    backward    blocks, last to first: recompute, gradients
    step        clipping and optimizer

With scheduled sampling a micro-batch has a forward pass more, whose phases have the same names.

What fake tensors have not, values, is answered as follows: numbers that are read are 1, conditions
hold as for packed rows, all tokens are targets, experts get equal shares.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from dist_peft.adapters.protocol import Adapter
from dist_peft.core.config.run import RunConfig
from dist_peft.core.config.sweep_points import count_joined
from dist_peft.core.world import World
from dist_peft.data.loader import Batch
from dist_peft.engine.activation_checkpointing import checkpoint_configured_blocks
from dist_peft.engine.engine_protocol import Engine
from dist_peft.engine.fake_ranks import fake_process_group
from dist_peft.model.experts import FrozenExperts
from dist_peft.model.parameter_readers import is_never_read
from dist_peft.model.skeleton import Skeleton
from dist_peft.plan.storage_tracker import Peak, StorageTracker
from dist_peft.plan.traced_batch import build_traced_batch
from dist_peft.plan.traced_engine import StatelessFactory, make_traced_engine
from dist_peft.quant.assumed_device import assume_device
from dist_peft.quant.cpu_products import has_fast_product
from dist_peft.quant.kernels import choose_nf4_kernel
from dist_peft.train.objective import TokenObjective
from dist_peft.train.predicted_inputs import find_replaceable_inputs, predict_next_tokens

__all__ = ["StepTrace", "count_forward_passes", "trace_step"]

CPU = torch.device("cpu")
_aten = torch.ops.aten


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flops(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


_FLOPS: dict[Any, Any] = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""Operator -> its floating point operations, by ``torch.utils.flop_counter``."""


@dataclass
class StepTrace:
    """A traced step of ``blocks`` blocks on one rank. Bytes.

    Attributes:
        blocks: their indices in the whole model.
        resting: live before the step, by purpose: parameters as sharded, buffers.
        peaks: phase -> largest live storage.
        input_bytes: what one more block keeps until its backward; 0 where it has none.
        host_bytes: of one more block in host memory (``engine.offload_inputs``).
        kept_gradients: whole gradients that stay between micro-batches, of all traced blocks.
        reduced_gradients: gradients at the optimizer step, of all traced blocks.
        gathered: phase -> bytes received in all-gathers, of the last micro-batch.
        gathered_first: the same of the first one, in which blocks to be kept are gathered.
        exchanged: bytes received of tokens that travel to their experts, among ``gathered``, of all
            blocks and the last micro-batch.
        flops: phase -> floating point operations of products and attention, of one micro-batch.
        passes: forward passes of a micro-batch, without recomputation.
        kept_blocks: traced blocks that stay gathered over the passes of a step.
    """

    blocks: tuple[int, ...]
    resting: dict[str, int]
    peaks: dict[str, Peak] = field(default_factory=dict)
    input_bytes: int = 0
    host_bytes: int = 0
    kept_gradients: int = 0
    reduced_gradients: int = 0
    gathered: Counter[str] = field(default_factory=Counter)
    gathered_first: Counter[str] = field(default_factory=Counter)
    exchanged: int = 0
    flops: Counter[str] = field(default_factory=Counter)
    passes: int = 1
    kept_blocks: int = 0

    @property
    def gathered_block(self) -> int:
        """Bytes of a gathered block."""
        first = self.gathered_first or self.gathered
        times = self.kept_blocks + self.passes * (len(self.blocks) - self.kept_blocks)
        return self._sum_phases(first, "forward") // times

    @property
    def block_flops(self) -> int:
        """Operations of one block in a micro-batch: forward, recomputation, backward."""
        whole = self._sum_phases(self.flops, "forward") + self._sum_phases(self.flops, "backward")
        return whole // len(self.blocks)

    def _sum_phases(self, counts: Counter[str], name: str) -> int:
        return sum(n for phase, n in counts.items() if phase.partition(" ")[0] == name)


def trace_step(
    skeleton: Skeleton,
    adapter: Adapter,
    config: RunConfig,
    world: World,
    *,
    blocks: Sequence[int],
    device_type: str,
    micro_batches: int,
) -> StepTrace:
    """Trace a step of rank ``world.rank``; ``skeleton`` and ``adapter`` are left unchanged.

    Args:
        skeleton: with ``adapter`` attached, not yet sharded.
        blocks: indices of the blocks that are kept.
        device_type: ``cuda`` or ``cpu``: which of the kernels' ways is taken.
        micro_batches: of the step; two show what stays between them.
    """
    model, kept, adapter = _copy_with_blocks(skeleton, adapter, blocks)
    sample_ids = torch.arange(config.train.micro_batch * count_joined(config))
    with fake_process_group(world), _take_way_of(device_type):
        engine = make_traced_engine(config, world, CPU)
        checkpoint_configured_blocks(kept, config.engine, CPU)
        engine.shard_model(model, kept)
        adapter.begin_micro_batch(0, sample_ids)
        objective, batch = build_traced_batch(model, config, sample_ids, device_type)
        with FakeTensorMode(allow_non_fake_inputs=True):
            _fill_with_fake_rows(model, engine)
            call = engine.setup_optimizer(model, StatelessFactory(), lambda name: 1.0)
            trace = StepTrace(
                tuple(blocks),
                {},
                passes=count_forward_passes(config),
                kept_blocks=min(config.engine.keep_gathered, len(blocks)),
            )
            tracker = _StepTracker(trace, engine, packed=config.data.packing)
            trace.resting = tracker.add_resting_tensors(model)
            exchanged = 0
            with tracker:
                tracker.follow_blocks(kept)
                for number in range(micro_batches):
                    tracker.enter_phase("embedding")
                    if number:
                        tracker.relabel_phase("backward 0", "gradients", ("backward",))
                        trace.kept_gradients = tracker.live_by_purpose.get("gradients", 0)
                        if number == 1:
                            trace.gathered_first = trace.gathered.copy()
                        trace.gathered.clear()
                        trace.flops.clear()
                    if trace.passes > 1:
                        _predict_inputs(model, batch, config)
                    loss = objective.compute_loss(model, batch, CPU, call)
                    engine.backward(loss / 3, last=number == micro_batches - 1)
                    del loss
                    trace.exchanged = _count_exchanged(model) - exchanged
                    exchanged += trace.exchanged
                tracker.relabel_phase("backward 0", "gradients", ("backward",))
                tracker.enter_phase("step")
                trace.reduced_gradients = tracker.live_by_purpose.get("gradients", 0)
                engine.step(1e-4, config.train.max_grad_norm)
    trace.peaks = tracker.peaks
    return trace


def _count_exchanged(model: nn.Module) -> int:
    found = [m.exchange for m in model.modules() if isinstance(m, FrozenExperts)]
    return sum(exchange.bytes_exchanged for exchange in found if exchange is not None)


def count_forward_passes(config: RunConfig) -> int:
    """Return the forward passes of a micro-batch: one more for scheduled sampling."""
    return 1 if config.train.scheduled_sampling is None else 2


def _predict_inputs(model: nn.Module, batch: Batch, config: RunConfig) -> None:
    """Run the pass of scheduled sampling as if every input were replaced."""
    section = config.train.scheduled_sampling
    assert section is not None
    places = find_replaceable_inputs(batch).nonzero() - torch.tensor([0, 1])
    uniforms = torch.zeros(len(places), dtype=torch.float64)
    predict_next_tokens(model, TokenObjective(), batch, CPU, places, uniforms, section.temperature)


def _copy_with_blocks(
    skeleton: Skeleton, adapter: Adapter, indices: Sequence[int]
) -> tuple[nn.Module, list[nn.Module], Any]:
    """Copy a meta model with some of its blocks only."""
    model = skeleton.model
    holder = next(
        m for m in model.modules() if isinstance(m, nn.ModuleList) and list(m) == skeleton.blocks
    )
    text: Any = model.config.get_text_config()
    whole, count = holder._modules, text.num_hidden_layers
    holder._modules = {str(n): whole[str(i)] for n, i in enumerate(indices)}
    text.num_hidden_layers = len(indices)
    try:
        copied, own = copy.deepcopy((model, adapter))
    finally:
        holder._modules, text.num_hidden_layers = whole, count
    names = {id(m): n for n, m in model.named_modules()}
    layers = copied.get_submodule(names[id(holder)])
    assert isinstance(layers, nn.ModuleList)
    kept = list(layers)
    return copied, kept, own


def _fill_with_fake_rows(model: nn.Module, engine: Engine) -> None:
    """Give every parameter this rank's rows, without values; call inside of a fake mode."""
    uses: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not is_never_read(module, name):
                uses.setdefault(id(parameter), []).append((module, name))
    for (owner, name), *others in uses.values():
        parameter = owner._parameters[name]
        assert parameter is not None
        rows = len(engine.local_row_span(parameter))
        shape = (rows, *parameter.shape[1:])
        engine.fill_local_rows(owner, name, torch.empty(shape, dtype=parameter.dtype))
        for other, its_name in others:
            other.register_parameter(its_name, owner._parameters[name])
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _StepTracker(StorageTracker):
    """Follows a step through its phases, block by block, and fills a ``StepTrace``."""

    def __init__(self, trace: StepTrace, engine: Engine, packed: bool) -> None:
        super().__init__()
        self.trace, self.engine, self.packed = trace, engine, packed
        self._gathered = self._on_host = 0

    def add_resting_tensors(self, model: nn.Module) -> dict[str, int]:
        """Count parameters and buffers as they rest; return bytes by purpose."""
        hidden = (t for m in model.modules() for t in vars(m).values())
        parameters = [*model.parameters(), *(t for t in hidden if isinstance(t, nn.Parameter))]
        resting = [p for p in parameters if not p.is_meta and p.untyped_storage().nbytes()]
        self.add_tensors([p for p in resting if p.requires_grad], "adapter")
        self.add_tensors(resting, "base")
        self.add_tensors([p for p in parameters if not p.is_meta], "gathered")  # empty until then
        self.add_tensors(model.buffers(), "buffers")
        return self.live_by_purpose

    def enter_phase(self, phase: str) -> None:
        received = self.engine.bytes_gathered
        self.trace.gathered[self.phase] += received - self._gathered
        self._gathered = received
        super().enter_phase(phase)

    def run_operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator, or return a stand-in for a result that depends on values.

        Real tensors (ids, positions, labels of the batch) stay real as long as no fake one comes
        in, so that code may read them.
        """
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        if tensors and not any(isinstance(t, FakeTensor) for t in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is _aten._local_scalar_dense.default:
            return not self.packed if args[0].dtype == torch.bool else 1
        if func is _aten.nonzero.default:
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.long)
        result = func(*args, **kwargs)
        packet = getattr(func, "_overloadpacket", None)
        count = _FLOPS.get(packet)
        if count is not None:
            self.trace.flops[self.phase] += count(*args, **kwargs, out_val=result)
        return result

    def follow_blocks(self, blocks: Sequence[nn.Module]) -> None:
        """Enter a phase at the start of each block's forward and backward."""
        for number, block in enumerate(blocks):
            self._follow_block(block, number, len(blocks) - 1)

    def _follow_block(self, block: nn.Module, number: int, last: int) -> None:
        def before_forward(module: nn.Module, inputs: Any) -> None:
            self.enter_phase(f"forward {number}")

        def after_forward(module: nn.Module, inputs: Any, output: Any) -> None:
            on_host, self._on_host = self._on_host, self.host_bytes
            before = self.live_by_purpose.get("block inputs", 0)
            self.relabel_phase(f"forward {number}", "block inputs", ("forward", "dequantized"))
            inputs_now = self.live_by_purpose.get("block inputs", 0)
            if number == last:
                self.enter_phase("head")
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor) and hidden.requires_grad:
                # an input that was copied to the host makes room for the next one
                self.trace.host_bytes = self.host_bytes - on_host
                self.trace.input_bytes = inputs_now - before - self.trace.host_bytes
                hidden.register_hook(before_backward)

        def before_backward(gradient: Tensor) -> None:
            if number < last:
                self.relabel_phase(f"backward {number + 1}", "gradients", ("backward",))
            self.enter_phase(f"backward {number}")

        block.register_forward_pre_hook(before_forward, prepend=True)
        block.register_forward_hook(after_forward)


@contextmanager
def _take_way_of(device_type: str) -> Iterator[None]:
    """Let the kernels, on fake CPU tensors, do as on ``device_type``, each loop once."""
    for dtype in (torch.bfloat16, torch.float16):
        has_fast_product(CPU, dtype)  # a trial, whose result is kept: not on fake tensors
    with assume_device(torch.device(device_type)):
        # imports bitsandbytes: an error that it logs would keep the tensors of a step
        choose_nf4_kernel(64, torch.bfloat16, CPU)
        yield
