"""Losses of next tokens computed inside the output head, so that full logits never exist.

The usual order multiplies *all* positions with the head, keeps logits ``[B, S, V]`` and, in
backward, their gradient of the same size; with V = 150 000 and 4096 positions in bfloat16 that is
2.3 GiB, although most positions of instruction data have no target. Here the head itself computes
the losses, from the hidden states of the ``N`` positions that have a target, a chunk of rows at a
time (the scheme of Liger Kernel's fused linear cross entropy, Hsu et al. 2024)::

    forward    for each chunk of rows of h [N, H]:
                   z  = h W^T                      [rows, V], the only logits there are
                   l  = logsumexp(z) - z[target]
                   dh = (softmax(z) - onehot) W    kept: [N, H] float32
    backward   grad h = upstream_i dh_i            no logits, no second product, no weight

A quantized head (``base.quant.embeddings``) of more than 2^26 weights is never dequantized whole:
each product takes it panel by panel, so that each chunk of rows decodes it twice. Smaller ones are
dequantized once.

A frozen head needs no gradient of its own, so the product ``(softmax - onehot) W`` can be made
while ``z`` is there: two products with the head instead of the three of a recomputed one, and the
weight is dequantized once. The difference to Liger's kernel: it averages and keeps a gradient of
the weight; here losses stay apart by position (evaluation sums them by sequence), and the head is
frozen.

Rounding follows the whole-logits path: logits and their gradient have the hidden states' type,
arithmetic of the loss is float32 (float64 for float64).

The method works for a head whose output *is* the model's ``logits``. Families that scale or cap
logits afterwards (Gemma 2's soft cap, Cohere's and Granite's scale) and trainable heads use the
whole logits (``train.loss``); ``model.forward_probe`` finds out which families do.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_peft.core.device_copy import copy_to_device
from dist_peft.model.frozen_linear import WHOLE_ELEMENTS, FrozenLinear
from dist_peft.quant.assumed_device import get_assumed_device
from dist_peft.quant.cpu_products import has_fast_product
from dist_peft.quant.device_choice import is_device_path
from dist_peft.train.loss import IGNORE

__all__ = [
    "compute_frozen_head_losses",
    "computes_losses_at_head",
    "iterate_frozen_head_logits",
    "replace_head_output",
    "replace_logits_by_loss",
    "replace_logits_by_losses",
]

_CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
"""Logits at a time, on a CPU twice as many of 16 bits: 16 MiB. A product of fewer rows is slower by
up to a tenth there (by a quarter at 64 rows and V = 32 000)."""

_CACHED_ELEMENTS = 2**18
"""Logits at a time in float32 on a CPU, 1 MiB: six passes over them stay in its cache."""

_WEIGHT_ELEMENTS = 2**22
"""Values of the weight in float32 at a time, where 16-bit products are computed in float32."""

_PANEL_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}
"""Values of a quantized weight that are dequantized at a time: 64 MiB in 16 bits on a GPU."""


def computes_losses_at_head(model: nn.Module) -> bool:
    """Return whether the model's head is frozen and its output is the model's logits, unchanged."""
    head = _find_head(model)
    if head is None or not getattr(model, "head_output_is_logits", False):
        return False
    return not any(p.requires_grad for p in head.parameters())


@contextmanager
def replace_logits_by_losses(model: nn.Module, labels: Tensor) -> Iterator[None]:
    """Within the context, a forward of ``model`` returns losses ``[N]`` in place of logits.

    Only for models of which ``computes_losses_at_head`` is true.

    Args:
        labels: int64 ``[B, S]`` on the CPU: the token predicted *at* each position (already
            shifted), or -100. ``N`` of them are targets; losses are in their row-major order.
    """
    positions = (labels != IGNORE).nonzero()
    targets = labels[positions[:, 0], positions[:, 1]]

    def compute_losses(hidden: Tensor, head: nn.Module) -> Tensor:
        return compute_frozen_head_losses(hidden, copy_to_device(targets, hidden.device), head)

    with replace_head_output(model, positions, compute_losses):
        yield


@contextmanager
def replace_logits_by_loss(model: nn.Module, labels: Tensor) -> Iterator[None]:
    """The same with the sum of the losses, a scalar, in place of logits.

    A head with an attribute ``sum_target_losses`` computes it by that (``engine.liger_kernels``).

    Args:
        labels: as of ``replace_logits_by_losses``.
    """
    positions = (labels != IGNORE).nonzero()
    targets = labels[positions[:, 0], positions[:, 1]]

    def compute_loss(hidden: Tensor, head: nn.Module) -> Tensor:
        chosen = copy_to_device(targets, hidden.device)
        kernel = getattr(head, "sum_target_losses", None)
        if kernel is not None and len(chosen) and is_device_path(hidden, hidden.dtype):
            loss: Tensor = kernel(hidden, chosen)
            return loss
        return compute_frozen_head_losses(hidden, chosen, head).sum()

    with replace_head_output(model, positions, compute_loss):
        yield


@contextmanager
def replace_head_output(
    model: nn.Module, positions: Tensor, compute: Callable[[Tensor, nn.Module], Tensor]
) -> Iterator[None]:
    """Within the context, a forward of ``model`` returns a result of ``compute`` for its logits.

    Only for models of which ``computes_losses_at_head`` is true.

    Args:
        positions: int64 ``[N, 2]``: rows and columns of the batch; there may be none.
        compute: gets the head's inputs ``[N, H]`` at these positions, and the head.
    """
    head = _find_head(model)
    assert head is not None

    def compute_chosen(hidden: Tensor) -> Tensor:
        rows, columns = copy_to_device(positions, hidden.device).unbind(1)
        return compute(hidden[rows, columns], head)

    own = vars(head)
    assert "forward" not in own
    own["forward"] = compute_chosen  # the instance's, so that the engine's hooks still run
    try:
        yield
    finally:
        del own["forward"]


def iterate_frozen_head_logits(hidden: Tensor, head: nn.Module) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits of a chunk of rows at a time, float32 ``[rows, V]`` (float64 for float64).

    Args:
        hidden: ``[N, H]``, the head's input.
        head: as in ``compute_frozen_head_losses``.
    """
    weight = _HeadWeight(head, hidden)
    arithmetic = torch.promote_types(hidden.dtype, torch.float32)
    for part in _split_into_chunks(hidden, weight.rows):
        yield part, _compute_logits(hidden[part], weight).to(arithmetic)


def compute_frozen_head_losses(hidden: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    """Return the cross entropy of each row in nats, float32 ``[N]`` (float64 for float64).

    Args:
        hidden: ``[N, H]``, the head's input at positions with a target.
        targets: int64 ``[N]``.
        head: a frozen ``FrozenLinear`` or ``nn.Linear``, ``[V, H]``, with or without bias.
    """
    losses: Tensor = _FrozenHeadLoss.apply(hidden, targets, head)
    return losses


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
        weight = _HeadWeight(head, hidden)
        arithmetic = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(len(hidden), dtype=arithmetic, device=hidden.device)
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = torch.empty(hidden.shape, dtype=arithmetic, device=hidden.device)
        for part in _split_into_chunks(hidden, weight.rows):
            logits = _compute_logits(hidden[part], weight)
            _compute_losses(logits, targets[part], losses[part], gradient is not None)
            if gradient is not None:
                gradient[part] = _multiply_by_weight(logits, weight, arithmetic)
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0].unsqueeze(1)).to(ctx.dtype), None, None


def _find_head(model: nn.Module) -> nn.Module | None:
    found = getattr(model, "get_output_embeddings", lambda: None)()
    return found if isinstance(found, FrozenLinear | nn.Linear) else None


class _HeadWeight:
    """The weight ``[rows, H]`` of a frozen head, in panels of rows.

    Attributes:
        is_upcast: panels are float32, since 16-bit products are computed in it.

    Args:
        head: a frozen ``FrozenLinear`` or ``nn.Linear``.
        hidden: inputs, whose type the weight is used in and whose device it is on.
    """

    def __init__(self, head: nn.Module, hidden: Tensor) -> None:
        assert isinstance(head, FrozenLinear | nn.Linear)
        self.rows, self.columns, self.bias = head.out_features, head.in_features, head.bias
        self._dtype, self._packed = hidden.dtype, head if isinstance(head, FrozenLinear) else None
        self.is_upcast = not has_fast_product(hidden.device, hidden.dtype)
        self._weight: Tensor | None = None
        elements = _WEIGHT_ELEMENTS if self.is_upcast else self.rows * self.columns
        if not isinstance(head, FrozenLinear):
            self._weight = head.weight.detach().to(self._dtype)
        elif not head.codec.is_quantized or self.rows * self.columns <= WHOLE_ELEMENTS:
            self._weight = head.dequantize_weight(self._dtype)
        else:
            device = get_assumed_device() or hidden.device
            elements = min(elements, _PANEL_ELEMENTS.get(device.type, _PANEL_ELEMENTS["cuda"]))
        self._panel_rows = max(1, elements // self.columns)

    def iterate_panels(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows and their weight ``[n, H]``, in float32 where 16-bit products are computed in
        it (``quant.cpu_products``). Where a device is assumed, one packed panel stands for all."""
        once = self._weight is None and get_assumed_device() is not None
        for first in range(0, self._panel_rows if once else self.rows, self._panel_rows):
            panel = slice(first, min(first + self._panel_rows, self.rows))
            if self._weight is not None:
                weight = self._weight[panel]
            else:
                assert self._packed is not None
                packed = self._packed.packed.detach()[panel]
                weight = self._packed.codec.dequantize_rows(packed, self.columns, self._dtype)
            yield panel, weight.float() if self.is_upcast else weight


def _compute_logits(hidden: Tensor, weight: _HeadWeight) -> Tensor:
    """Return ``hidden W^T + bias`` [rows, V] in ``hidden``'s type."""
    dtype, bias = hidden.dtype, weight.bias
    result = torch.empty(len(hidden), weight.rows, dtype=dtype, device=hidden.device)
    wide = hidden.float() if weight.is_upcast else hidden
    for panel, part in weight.iterate_panels():
        if bias is None and not weight.is_upcast and len(part) == weight.rows:
            return wide @ part.T
        logits = (wide @ part.T).to(dtype)
        result[:, panel] = logits if bias is None else logits + bias[panel].to(dtype)
    return result


def _compute_losses(logits: Tensor, targets: Tensor, losses: Tensor, needs_gradient: bool) -> None:
    """Write the losses of rows; with ``needs_gradient`` replace ``logits`` by their gradient, in
    their own type.

    Some rows at a time are taken in ``losses``' type, on a CPU as many as stay in its cache.
    """
    device = get_assumed_device() or logits.device
    size = _CACHED_ELEMENTS // logits.shape[1] if device.type == "cpu" else len(logits)
    for own, chosen, loss in zip(
        *(part.split(max(1, size)) for part in (logits, targets.unsqueeze(1), losses)), strict=True
    ):
        rows = own.to(losses.dtype)
        target_logits = rows.sub_(rows.amax(1, keepdim=True)).gather(1, chosen).squeeze(1)
        normalizers = rows.exp_().sum(1)
        torch.sub(normalizers.log(), target_logits, out=loss)
        if needs_gradient:
            rows.div_(normalizers.unsqueeze(1))
            rows.scatter_add_(1, chosen, -torch.ones_like(chosen, dtype=rows.dtype))
            own.copy_(rows)


def _multiply_by_weight(gradient: Tensor, weight: _HeadWeight, dtype: torch.dtype) -> Tensor:
    """Return ``gradient W`` [rows, H]; panels are added up in ``dtype``."""
    result = torch.zeros(len(gradient), weight.columns, dtype=dtype, device=gradient.device)
    for panel, part in weight.iterate_panels():
        columns = gradient[:, panel]
        if weight.is_upcast:
            result.addmm_(columns.float(), part)
        else:
            result += columns @ part
    return result


def _split_into_chunks(hidden: Tensor, vocabulary: int) -> Iterator[slice]:
    device = get_assumed_device() or hidden.device
    elements = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS["cuda"])
    if device.type == "cpu" and hidden.element_size() == 2:
        elements *= 2
    size = max(1, elements // vocabulary)
    for first in range(0, len(hidden), size):
        yield slice(first, first + size)
