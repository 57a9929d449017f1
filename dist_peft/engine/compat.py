"""Changes made to other libraries, all of them: nothing else assigns to a foreign module.

Each says when it goes; a test fails once it can. Besides, a name that torch has renamed.

Frozen uint8 parameters under FSDP2 on torch 2.11:

torch 2.12 taught FSDP2 about parameters that are not floating point (pytorch issue 177844). Before
that, ``FSDPParam`` first wraps every shard in ``nn.Parameter(shard)``, which refuses integers
because a parameter requires gradients by default, and its mixed-precision set-up would
cast them. This project never uses FSDP2's mixed precision, so only the wrapping needs fixing: in
that one module the name ``nn`` is replaced by a namespace whose ``Parameter`` asks for no gradient
on integers. On torch 2.12 and later nothing is touched. Goes when ``pyproject.toml`` requires torch
2.12.

DeepSpeed counts no gathered bytes, so its all-gathers are wrapped; goes when it has a counter. It
compiles shared-memory collectives when it is initialized, seconds on every CPU rank and useless for
gloo; goes when ``init_distributed`` has an option.

ZeRO-3's autograd function before each module changes the order in which gradients of activations
are added up, so exact runs replace it by a hook; goes when DeepSpeed has an option for its own.

torch's deterministic algorithms also fill every new tensor with NaN, a kernel for each gather
buffer; that is switched off, and goes when it is an argument of ``use_deterministic_algorithms``.

A model of transformers calls its file's ``apply_rotary_pos_emb`` by name, so another one, for
attentions that ask for it, is put into the file; goes when it is called through the module.

Engines free gathered bytes with ``UntypedStorage.resize_``, which no dispatch mode sees, so a plan
of a step watches it; goes when a mode does.
"""

import functools
import os
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param

__all__ = [
    "all_gather",
    "allow_integer_parameters",
    "count_deepspeed_gathers",
    "gather_from_computing_stream",
    "keep_gradient_sums",
    "reduce_scatter",
    "route_rotary_function",
    "skip_deepspeed_compilation",
    "use_deterministic_kernels",
    "watch_storage_resizes",
]

# renamed in torch 2.13; the old name still works there but warns
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""``all_gather_chunks(output, input, group=, async_op=)``: one tensor from each rank into one
tensor."""


reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
"""``reduce_scatter(output, input, group=)``: sums, of which each rank gets its part."""


def allow_integer_parameters() -> None:
    """Let ``fully_shard`` take uint8 parameters on torch before 2.12; idempotent."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) >= (2, 12) or not isinstance(_fsdp_param.nn, types.ModuleType):
        return
    if getattr(_fsdp_param.nn, "takes_integers", False):
        return

    def make_parameter(data: Tensor, requires_grad: bool = True) -> nn.Parameter:
        return nn.Parameter(data, requires_grad and data.is_floating_point())

    class Namespace(types.ModuleType):
        takes_integers = True
        Parameter = staticmethod(make_parameter)

        def __getattr__(self, name: str) -> Any:
            return getattr(nn, name)

    _fsdp_param.nn = Namespace("torch.nn for integer shards")


def gather_from_computing_stream(root: FSDPModule) -> None:
    """Let all units of ``root`` issue their all-gathers from the stream that computes.

    FSDP2 issues them from a stream of its own otherwise, in whose memory pool each buffer stays
    until the next unit is copied out. Forward then overlaps by explicit prefetching alone. The
    method has no public name yet (torch 2.6 to 2.13).
    """
    root._set_unshard_async_op(True)


def count_deepspeed_gathers(deepspeed: Any, add_bytes: Callable[[int], None]) -> None:
    """Call ``add_bytes`` with the output bytes of each all-gather that DeepSpeed runs."""
    backend = deepspeed.comm.comm.cdb

    def wrap_collective(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call_and_count(*args: Any, **kwargs: Any) -> Any:
            output = [*args, *kwargs.values()][0]
            tensors = [output] if isinstance(output, Tensor) else output
            add_bytes(sum(t.numel() * t.element_size() for t in tensors))
            return collective(*args, **kwargs)

        return call_and_count

    for name in ("all_gather", "all_gather_into_tensor", "all_gather_coalesced"):
        setattr(backend, name, wrap_collective(getattr(backend, name)))


class _InputHooks:
    """Stands in for the autograd function that ZeRO-3 puts before a module (``post_bwd_fn``)."""

    def __init__(self, module: nn.Module, function: Any) -> None:
        self._module, self._function = module, function

    def apply(self, value: Tensor) -> Tensor:
        """Call the function's backward with the gradient of ``value``, and return ``value``."""
        if value.requires_grad:
            context = SimpleNamespace()
            self._function.setup_context(context, (value,), value)
            value.register_hook(lambda grad: self._run_backward(context, grad))
        return value

    def _run_backward(self, context: SimpleNamespace, grad: Tensor) -> None:
        self._function.backward(context, grad)


def keep_gradient_sums(model: nn.Module) -> None:
    """Let ZeRO-3 leave the order alone in which gradients of activations are added up.

    It puts an autograd function before each module, to learn when the module's backward is done:
    gradients of several readers of one tensor inside of a module are then added up before they meet
    those of other readers, ``(a + b) + (c + d)`` instead of ``((a + b) + c) + d``. A hook on the
    tensor learns it too. DeepSpeed has that as an alternative in its source without an option for
    it (``_alternate_post_backward_module_hook``, 0.19).
    """
    for module in model.modules():
        function = module.__dict__.get("post_bwd_fn")
        if function is not None and not isinstance(function, _InputHooks):
            module.post_bwd_fn = _InputHooks(module, function)  # type: ignore[assignment]


def skip_deepspeed_compilation(deepspeed: Any) -> None:
    """Mark the shared-memory collectives as not compatible, so that they are not compiled."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def use_deterministic_kernels() -> None:
    """Let torch and cuBLAS add up in one order, for the rest of the process."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def route_rotary_function(source: types.ModuleType, rotate: Callable[..., Any]) -> None:
    """Let ``rotate(own, ...)`` answer calls of a file's ``apply_rotary_pos_emb``; idempotent.

    Args:
        source: a modeling file of transformers.
        rotate: gets the file's own function, and the arguments.
    """
    own = source.apply_rotary_pos_emb
    if not getattr(own, "is_routed", False):

        @functools.wraps(own)
        def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **more: Any) -> Any:
            if others or more:
                return own(q, k, cos, sin, *others, **more)
            return rotate(own, q, k, cos, sin)

        apply.is_routed = True  # type: ignore[attr-defined]
        source.apply_rotary_pos_emb = apply  # type: ignore[attr-defined]


@contextmanager
def watch_storage_resizes(report: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Call ``report`` with a storage after each resize inside the context."""
    resize = torch.UntypedStorage.resize_

    def resize_and_report(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        report(storage)
        return result

    torch.UntypedStorage.resize_ = resize_and_report  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
