"""AdapterFusion: attention over the outputs of trained bottleneck adapters.

Pfeiffer et al. 2021, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning"
(section 3). At each place where ``N`` adapters stand, which are frozen, a token chooses among
their outputs. With ``x`` the residual stream, ``f`` the sublayer's output, and ``h`` the adapters'
input (``adapters.bottleneck``)::

    h -+- adapter 1 - u_1 -+
       |    ...            +-- attention -- sum a_i u_i -- V --(+)-- f'      q = Q h + b_Q
       +- adapter N - u_N -+       |                            |            k_i = K u_i + b_K
       +------- Q -----------------+                            f            a = softmax(q . k_i)

    f' = f + V sum_i a_i u_i                Q, K, V [d, d]; b_Q, b_K [d]; V has no bias

This equals AdapterHub's ``BertFusion`` with its preset ``dynamic``; scores are not
divided by sqrt(d). Two products are taken in another order, so that the cost does not grow with
``N``: ``q . (K u_i + b_K) = (K^T q) . u_i + q . b_K``, and ``V`` is applied to the sum. The second
term is the same for all ``i`` and cancels in the softmax, unless scores are dropped out before:
only then is ``b_K`` trainable. (Else its gradient would be rounding errors, of which Adam makes
steps of full length.)

Differences to the paper: none in the formula for BERT. In models whose norm comes first, ``h`` is
the raw stream, as for the adapters themselves.

**Initialization.** ``Q`` and ``K`` normal with deviation 0.02, biases zero, ``V`` the identity with
1e-6 off its diagonal: at first ``f'`` is ``f`` plus a mean of the adapters. ``V`` is stored as its
change ``V - I``: weight decay pulls towards the identity, and no 1 hides a small change.

**Penalty.** The loss has ``lambda |V - I|^2`` (Frobenius) for each place. Its gradient,
``2 lambda (V - I)``, is added where ``V`` is used, in backward, once for each micro-batch of each
rank, divided by their number (``IdentityRegularizer``): engines add gradients up, so that it
counts once a step. The reported loss is the tokens' alone.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_peft.adapters.bottleneck.layer import BottleneckLayer, add_meta_parameters
from dist_peft.adapters.fusion.attention_meter import AttentionMeter
from dist_peft.core.seeds import derive_seed
from dist_peft.core.span import Span
from dist_peft.model.adapter_module import SwitchableLayer
from dist_peft.model.sample_dropout import SampleDropout
from dist_peft.quant.frozen_matmul import matmul_fp32_accumulate
from dist_peft.quant.trainable_products import apply_linear, multiply_batched

__all__ = ["FusionLayer", "IdentityRegularizer", "init_near_identity"]

_DEVIATION = 0.02
_OFF_DIAGONAL = 1e-6


class IdentityRegularizer:
    """How strongly ``V`` is pulled to the identity; shared by the layers of a model.

    Engines may scale a loss before its backward pass, DeepSpeed by the number of ranks, as it takes
    means. The pull is scaled alike: it looks at the gradient that arrives at the loss, which is the
    first thing that backward computes.

    Args:
        regularization: ``lambda``.
    """

    def __init__(self, regularization: float) -> None:
        self.regularization = regularization
        self.strength = 0.0

    def attach_to_loss(self, loss: Tensor, parts: float) -> None:
        """Act in the backward pass of ``loss``, one of ``parts`` of an optimizer step."""

        def record_loss_scale(grad: Tensor) -> None:
            self.strength = 2 * self.regularization / parts * float(grad)

        self.strength = 0.0
        if self.regularization:
            loss.register_hook(record_loss_scale)


class _RegularizedLinear(torch.autograd.Function):
    """``y = x W^T``, and ``dW`` grows by the pull's strength times ``W``.

    ``W`` is kept as an object, not saved: engines free and refill its storage between forward and
    backward (as in ``quant.frozen_matmul``). A forward recomputed by activation checkpointing has
    no backward of its own, so the pull is not counted twice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, pull: IdentityRegularizer) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.pull = weight, pull
        return matmul_fp32_accumulate(F.linear, x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        weight = ctx.weight.detach()
        grad_x = matmul_fp32_accumulate(torch.matmul, grad, weight.to(grad.dtype))
        flat = grad.flatten(0, -2).T
        grad_weight = matmul_fp32_accumulate(torch.matmul, flat, x.flatten(0, -2)).to(weight.dtype)
        return grad_x, grad_weight.add_(weight, alpha=ctx.pull.strength), None


class FusionLayer(SwitchableLayer):
    """The fusion of the adapters of one place: attention of the sublayer over their outputs.

    Args:
        base: the module that returns ``f``, after which this one is loaded.
        path: this module's name in the model.
        adapters: the frozen adapters by name; they read the same ``h``.
        dropout: on the scores.
        pull: the penalty on ``V``.
        meter: records the attention weights in evaluation.
        seed: of the run; start values also depend on the path.
        device: where the (unfilled) parameters are made.

    Attributes:
        names: of the adapters.
        query_weight, key_weight: ``[d, d]``.
        query_bias, key_bias: ``[d]``.
        value_change: ``V - I``, ``[d, d]``.
        shapes: of the parameters, by name.
    """

    query_weight: nn.Parameter
    query_bias: nn.Parameter
    key_weight: nn.Parameter
    key_bias: nn.Parameter
    value_change: nn.Parameter

    def __init__(
        self,
        base: nn.Module,
        path: str,
        adapters: Mapping[str, BottleneckLayer],
        dropout: SampleDropout,
        pull: IdentityRegularizer,
        meter: AttentionMeter,
        *,
        seed: int,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.path, self.pull, self.meter, self.seed = path, pull, meter, seed
        self.names, self.dropout = tuple(adapters), dropout
        self.adapters = nn.ModuleList(adapters.values())  # names may be those of a method
        self._base = (base,)  # not a child: it is the block's
        spec = next(iter(adapters.values())).spec
        d, self.arithmetic = spec.hidden, spec.arithmetic
        self.shapes: dict[str, tuple[int, ...]] = {
            "query_weight": (d, d),
            "query_bias": (d,),
            "key_weight": (d, d),
            "key_bias": (d,),
            "value_change": (d, d),
        }
        self._given: dict[str, Tensor] = {}
        add_meta_parameters(self, self.shapes, device)
        self.key_bias.requires_grad_(dropout.p > 0)

    @property
    def base(self) -> nn.Module:
        return self._base[0]

    def forward(self, output: Tensor, stream: Tensor | None = None) -> Tensor:
        """``f`` [B, S, d] and ``x`` [B, S, d] -> ``f'`` in the type of ``f``.

        Args:
            output, stream: as of ``BottleneckLayer``.
        """
        if not self.is_enabled:
            return output
        adapters: list[Any] = list(self.adapters)
        h = adapters[0].select_adapter_input(output, stream)
        outputs = torch.stack(
            [adapter.compute_residual(h) for adapter in adapters], -2
        )  # [B, S, N, d]
        attention = self._compute_attention(h, outputs)
        if self.meter.is_counting:
            self.meter.add_attention(self.path, attention)
        mixed = multiply_batched(attention.to(outputs.dtype).unsqueeze(-2), outputs).squeeze(-2)
        change = _RegularizedLinear.apply(mixed, self.value_change, self.pull)
        return (output.to(self.arithmetic) + mixed + change).to(output.dtype)

    def _compute_attention(self, h: Tensor, outputs: Tensor) -> Tensor:
        """``a`` [B, S, N], float32."""
        query = apply_linear(h, self.query_weight, self.query_bias)
        key = apply_linear(query, self.key_weight.T)  # K^T q
        scores = multiply_batched(outputs, key.unsqueeze(-1)).squeeze(-1).float()
        if self.key_bias.requires_grad:
            scores = scores + apply_linear(query, self.key_bias.unsqueeze(0)).float()
        return self.dropout(scores).softmax(-1)

    def load_initial_values(self, tensors: Mapping[str, Tensor]) -> None:
        """Whole parameters by own name, to start from instead of those of the paper."""
        self._given = dict(tensors)

    def init_rows(self, name: str, span: Span) -> Tensor:
        """Return initial values of rows ``span`` of parameter ``name``."""
        shape = self.shapes[name]
        if name in self._given:
            return self._given[name][span.slice].float()
        if name.endswith("bias"):
            return torch.zeros(len(span))
        if name == "value_change":
            return init_near_identity(span, shape[1])
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.path, name))
        value = torch.empty(shape).normal_(std=_DEVIATION, generator=generator)
        return value[span.slice].clone()

    def extra_repr(self) -> str:
        return f"{len(self.adapters)} adapters, d={self.shapes['key_bias'][0]}"


def init_near_identity(span: Span, size: int) -> Tensor:
    """Rows ``span`` of ``V - I`` at the start: 1e-6 off the diagonal."""
    rows, index = torch.full((len(span), size), _OFF_DIAGONAL), torch.arange(len(span))
    rows[index, index + span.start] = 0.0
    return rows
