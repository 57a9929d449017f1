"""Liger's Triton kernels in the place of a model's own operators (Hsu et al. 2024).

``engine.kernels: liger`` puts kernels of the package liger-kernel where a model computes with
several operators of torch, each a launch and a pass over memory::

    norm     w x / rms(x)                 a module with one vector, of a class named ...RMSNorm
    swiglu   silu(gate(x)) * up(x)        a module with gate_proj, up_proj, down_proj
    rope     q cos + rotate(q) sin, k     apply_rotary_pos_emb of the attention's source file
    loss     the frozen head's losses     of target positions alone, with their gradient

Families differ in details that no name tells (Gemma adds one to ``w``, others rotate a part of a
head). So each function is tried on a few random numbers when the model is built, and replaced only
where it computes Liger's formula; elsewhere the reason is logged. Parameters, names and hooks stay:
an instance gets another ``forward``, and keeps its own for inputs that kernels do not take (fake
tensors of a plan, other types, trainable vectors).

Losses and gradients agree with those of transformers' modules up to rounding. The norm's and
SwiGLU's sums and products are float32 in both, but are rounded at other places.
"""

import copy
import importlib
import importlib.util
import logging
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.engine.compat import route_rotary_function
from dist_peft.model.frozen_linear import WHOLE_ELEMENTS, FrozenLinear
from dist_peft.quant.device_choice import is_device_path
from dist_peft.quant.kept_results import keeps_results

__all__ = ["apply_liger_kernels", "check_liger_kernels"]

log = logging.getLogger("dist_peft")

_NORM_FORMS = ((0.0, "llama"), (1.0, "gemma"), (0.0, "gemma"), (1.0, "llama"))
"""A number added to the vector, and whether it is multiplied before or after rounding."""

_TOLERANCE = 2**-7
"""Of a trial in bfloat16, relative to the largest number."""


class _ThreadState(threading.local):
    uses_rope = False


_state = _ThreadState()


def check_liger_kernels(device: torch.device) -> None:
    """Check that the kernels can run.

    Raises:
        UserError: no CUDA device, or the package is missing.
    """
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            "engine.kernels: liger needs a CUDA device, and the run computes on the CPU; leave it "
            "out"
        )
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            "engine.kernels: liger needs the package liger-kernel; pip install 'dist_peft[liger]'"
        )


def apply_liger_kernels(model: nn.Module, blocks: Sequence[nn.Module]) -> dict[str, int]:
    """Replace functions that Liger's kernels compute; log which, and why the rest is not.

    Args:
        model: may be on meta; adapters are attached or not.
        blocks: its decoder blocks.

    Returns:
        Replaced modules (``rope``: source files) by kind.

    Raises:
        UserError: nothing can be replaced.
    """
    counts, reasons = Counter[str](), Counter[str]()
    for module in model.modules():
        if _is_norm(module):
            _replace(module, "norm", _replace_norm(module), counts, reasons)
        elif all(hasattr(module, f"{name}_proj") for name in ("gate", "up", "down")):
            _replace(module, "swiglu", _replace_swiglu(module), counts, reasons)
    _replace_rope(blocks, counts, reasons)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, FrozenLinear) and _is_decoded_in_panels(head):
        reasons[f"{type(head).__name__}: the packed head is too large to be dequantized whole"] += 1
    elif isinstance(head, FrozenLinear | nn.Linear):
        vars(head)["sum_target_losses"] = partial(_sum_target_losses, head)
        counts["loss"] += 1
    if not counts:
        raise UserError(
            f"engine.kernels: liger has no kernel for {type(model).__name__}: "
            f"{'; '.join(reasons) or 'no part has a form that it knows'}; leave it out"
        )
    done = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    log.info("Liger's kernels compute %s", done)
    for reason, count in reasons.items():
        log.warning("engine.kernels: liger leaves %d x %s", count, reason, extra=ONCE)
    return dict(counts)


def _replace(
    module: nn.Module,
    kind: str,
    found: Callable[..., Tensor] | str,
    counts: Counter[str],
    reasons: Counter[str],
) -> None:
    if isinstance(found, str):
        reasons[f"{type(module).__name__}: {found}"] += 1
    else:
        vars(module)["forward"] = found
        counts[kind] += 1


def _import_operators(name: str) -> ModuleType:
    return importlib.import_module(f"liger_kernel.ops.{name}")


# -- norms -----------------------------------------------------------------------------------------


def _is_norm(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_parameters()]
    return "RMSNorm" in type(module).__name__ and names == ["weight"]


def _replace_norm(norm: Any) -> Callable[..., Tensor] | str:
    """Return another forward, or why there is none."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(eps, float) or norm.weight.dim() != 1:
        return "its epsilon or vector is not found"
    generator = torch.Generator().manual_seed(0)
    weight, x = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in (norm.weight.shape, (4, *norm.weight.shape))
    )
    probe = copy.copy(norm)
    probe.__dict__["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False)}
    expected = type(norm).forward(probe, x)
    errors = {
        form: _measure_error(_normalize(x, weight, eps, *form), expected) for form in _NORM_FORMS
    }
    form = min(errors, key=lambda one: errors[one])
    if errors[form] > _TOLERANCE:
        return "it computes something else than w x / rms(x)"
    own = norm.forward

    def forward(x: Tensor) -> Tensor:
        weight = norm.weight
        if weight.requires_grad or weight.dtype != x.dtype or not is_device_path(x, x.dtype):
            result: Tensor = own(x)
            return result
        operators = _import_operators("rms_norm")
        # not in place: the gradient of the sum that the norm reads is used elsewhere, too
        y: Tensor = operators.LigerRMSNormFunction.apply(x, weight, eps, *form, False)
        return y

    return forward


def _normalize(x: Tensor, weight: Tensor, eps: float, offset: float, casting: str) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if casting == "llama":
        return (weight + offset) * wide.to(x.dtype)
    return (wide * (weight.float() + offset)).to(x.dtype)


def _measure_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest number, infinity where forms differ."""
    if not isinstance(expected, Tensor) or found.shape != expected.shape:
        return float("inf")
    difference = (found.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max())


# -- SwiGLU ----------------------------------------------------------------------------------------


class _Doubled(nn.Module):
    """Stands for ``up_proj`` in a trial."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x + 1


def _replace_swiglu(mlp: Any) -> Callable[..., Tensor] | str:
    """Return another forward, or why there is none."""
    probe = copy.copy(mlp)
    children = {"gate_proj": nn.Identity(), "up_proj": _Doubled(), "down_proj": nn.Identity()}
    probe.__dict__["_modules"] = {**mlp._modules, **children}
    x = torch.linspace(-4, 4, 64).view(1, 2, 32)
    try:
        found = type(mlp).forward(probe, x)
    except Exception as error:  # any of another family
        return f"its forward is not that of a gated layer ({type(error).__name__})"
    if _measure_error(functional.silu(x) * (2 * x + 1), found) > 1e-5:
        return "its activation is not silu(gate) * up"
    own = mlp.forward

    def forward(x: Tensor) -> Tensor:
        if not is_device_path(x, x.dtype):
            result: Tensor = own(x)
            return result
        operators = _import_operators("swiglu")
        inner = operators.LigerSiLUMulFunction.apply(mlp.gate_proj(x), mlp.up_proj(x))
        y: Tensor = mlp.down_proj(inner)
        return y

    return forward


# -- rotary positions ------------------------------------------------------------------------------


def _replace_rope(blocks: Iterable[nn.Module], counts: Counter[str], reasons: Counter[str]) -> None:
    files: dict[str, str | None] = {}
    for block in blocks:
        for module in block.modules():
            name = type(module).__module__
            if not name.startswith("transformers.") or "Attention" not in type(module).__name__:
                continue
            if name not in files:
                files[name] = _try_rope(sys.modules[name])
                if files[name] is None:
                    route_rotary_function(sys.modules[name], _rotate)
                    counts["rope"] += 1
            if (reason := files[name]) is None:
                vars(module)["forward"] = partial(_attend_with_rope, module.forward)
            else:
                reasons[f"{type(module).__name__}: {reason}"] += 1


def _try_rope(source: ModuleType) -> str | None:
    """Return why the file's rotation is not Liger's; None if it is."""
    rotate = getattr(source, "apply_rotary_pos_emb", None)
    if rotate is None:
        return "its source file has no apply_rotary_pos_emb"
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 5, 8, generator=generator) for heads in (4, 2))
    angles = torch.randn(1, 5, 4, generator=generator).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    try:
        found = rotate(q, k, cos, sin)
    except Exception as error:  # any of another family
        return f"its rotation takes other arguments ({type(error).__name__})"
    expected = [one * cos[:, None] + _rotate_half(one) * sin[:, None] for one in (q, k)]
    pairs = zip(expected, found, strict=True)
    if max(_measure_error(one, other) for one, other in pairs) > 1e-5:
        return "its rotation pairs other elements"
    return None


def _rotate_half(x: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat([-right, left], -1)


def _attend_with_rope(forward: Callable[..., Any], *inputs: Any, **keywords: Any) -> Any:
    before, _state.uses_rope = _state.uses_rope, True
    try:
        return forward(*inputs, **keywords)
    finally:
        _state.uses_rope = before


def _rotate(own: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """Rotate by Liger's kernel inside of a replaced attention, else by the model's function."""
    is_known = _state.uses_rope and cos.dim() == 3 and cos.shape[-1] == q.shape[-1] == k.shape[-1]
    if not is_known or q.dtype != cos.dtype or not is_device_path(q, q.dtype):
        return own(q, k, cos, sin)
    if keeps_results("product"):
        q, k = q.clone(), k.clone()  # the kernel writes where it reads, maybe a kept result
    return _import_operators("rope").LigerRopeFunction.apply(q, k, cos, sin)


# -- losses ----------------------------------------------------------------------------------------


def _is_decoded_in_panels(head: FrozenLinear) -> bool:
    return head.codec.is_quantized and head.in_features * head.out_features > WHOLE_ELEMENTS


def _sum_target_losses(head: FrozenLinear | nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross entropy in nats, float32, with its gradient in ``hidden``.

    The weight is dequantized whole, in the type of ``hidden`` (``[V, H]``); logits are of a chunk.

    Args:
        hidden: ``[N, H]``, inputs of the head at positions with a target, ``N`` at least 1.
        targets: int64 ``[N]``.
    """
    weight = head.weight if isinstance(head, nn.Linear) else head.dequantize_weight(hidden.dtype)
    bias = None if head.bias is None else head.bias.detach().to(hidden.dtype)
    function = _import_operators("fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
    loss, *_ = function.apply(
        hidden, weight.detach().to(hidden.dtype), targets, bias, None, -100, 0.0, 0.0, "sum"
    )
    result: Tensor = loss
    return result
