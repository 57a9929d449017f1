"""LoRA layers: a frozen linear and its trainable low-rank change.

LoRA (Hu et al. 2021)::

    y = W x + b + s B A drop(x)         A [r, in], B [out, r]; s = alpha/r, rsLoRA: alpha/sqrt(r)

DoRA (Liu et al. 2024) also trains the length of each row of the weight, ``m`` [out]::

    y = m/n (W + s B A) drop(x) + b     n_o = ||W_o + s (B A)_o||, no gradient through n (sec. 4.3)

written as ``y_base + (m/n - 1) W drop(x) + m/n s B A drop(x)``, where ``y_base`` sees ``x`` without
dropout, as in PEFT. Other implementations decode ``W`` and form ``W + s B A`` in each forward to
get ``n``; here the norm is expanded, so that only products of size ``r`` are needed::

    n_o^2 = ||W_o||^2 + 2 s B_o . (W A^T)_o + s^2 B_o (A A^T) B_o^T

``||W_o||^2`` is computed when the base is loaded (``base_norm2``), ``W A^T`` is a frozen matmul of
``r`` vectors.

On a pruned base the change can be cut off where the base is zero (``quant.masked_product``)::

    y = W x + b + (M * s B A) drop(x)   M = (W != 0)

The output has the type of the base's output.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dist_peft.adapters.lora.initialization import (
    RESIDUAL_INITS,
    InitialFactors,
    init_loftq_factors,
    init_pissa_factors,
)
from dist_peft.adapters.low_rank.module import LowRankModule, LowRankSpec
from dist_peft.adapters.low_rank.row_sharded import LowRankFactors, add_factor_product
from dist_peft.core.seeds import derive_seed
from dist_peft.core.span import Span
from dist_peft.model.adapter_module import JoinedForm, Reduce
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.sample_dropout import SampleDropout
from dist_peft.quant.frozen_matmul import frozen_matmul
from dist_peft.quant.low_rank_linear import (
    FrozenLowRank,
    apply_frozen_low_rank,
    can_fuse_low_rank,
)
from dist_peft.quant.masked_product import apply_masked_low_rank

__all__ = ["FrozenProducts", "LoraLinear", "LoraSpec"]

_NORM_ROWS = 1024


class FrozenProducts(NamedTuple):
    """Products of the base that DoRA reads, made together with those of other layers.

    Attributes:
        inputs: ``W drop(x)`` [..., out], without the bias.
        directions: ``(W A^T)^T`` [r, out], without gradient.
    """

    inputs: Tensor
    directions: Tensor


class SharesInput(Protocol):
    """Linears that read one input."""

    def multiply(self, layer: "LoraLinear", x: Tensor) -> Tensor | None:
        """Return the product of ``layer``, made with those of the others; None: make it alone."""


@dataclass(frozen=True)
class LoraSpec(LowRankSpec):
    """Settings of one adapted module, in addition to ``LowRankSpec``'s.

    Attributes:
        dora: train the rows' lengths too.
        init: default (B = 0), pissa, loftq, eva or lora_ga.
        iterations: pissa: power iterations; loftq: alternations.
        keep_zeros: weights that are zero in the base are not changed (``quant.masked_product``).
    """

    dora: bool = False
    init: Literal["default", "pissa", "loftq", "eva", "lora_ga"] = "default"
    iterations: int = 4
    keep_zeros: bool = False


class LoraLinear(LowRankModule):
    """A ``FrozenLinear`` with LoRA or DoRA factors.

    Args:
        base: the wrapped linear.
        path: its name in the model.
        spec: settings of the module.
        dropout: on the adapter's input.
        device: where the (unfilled) parameters are made.

    Attributes:
        lora_A, lora_B: ``[r, in]``, ``[out, r]``.
        magnitude, base_norm2: ``[out]``, DoRA only; the latter is frozen.
        start_A, start_B: frozen initial factors, PiSSA, LoftQ and LoRA-GA only. A merge into the
            original weight subtracts them. With LoRA-GA the forward does so too, since its base is
            unchanged.
        removed_A, removed_B: frozen, LoftQ with several alternations only. The part subtracted
            from the weight before it was quantized (for PiSSA that is the start).
        siblings: linears that read the same input (``adapters.lora.siblings``); None: unknown.
        num_zeros: zeros of the whole weight; counted with ``keep_zeros`` only.
    """

    starts_at_zero = "lora_B"
    spec: LoraSpec
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    magnitude: nn.Parameter
    base_norm2: nn.Parameter
    start_A: nn.Parameter
    start_B: nn.Parameter

    def __init__(
        self,
        base: FrozenLinear,
        path: str,
        spec: LoraSpec,
        dropout: SampleDropout,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__(path, spec)
        self.base = base
        self.dropout = dropout
        shape_a, shape_b = (spec.r, base.in_features), (base.out_features, spec.r)
        self._add_meta_parameter("lora_A", shape_a, device, train=True)
        self._add_meta_parameter("lora_B", shape_b, device, train=True)
        if spec.dora:
            self._add_meta_parameter("magnitude", (base.out_features,), device, train=True)
            self._add_meta_parameter("base_norm2", (base.out_features,), device, train=False)
        frozen = ["start"] if spec.init in (*RESIDUAL_INITS, "lora_ga") else []
        if spec.init == "loftq" and spec.iterations > 1:
            frozen.append("removed")
        for prefix in frozen:
            self._add_meta_parameter(f"{prefix}_A", shape_a, device, train=False)
            self._add_meta_parameter(f"{prefix}_B", shape_b, device, train=False)
        self.start_names = tuple(f"{prefix}_{factor}" for prefix in frozen for factor in "AB")
        self._given: dict[str, Tensor] = {}
        self.siblings: SharesInput | None = None
        self.num_zeros = 0

    @property
    def joined_form(self) -> JoinedForm:
        """How several layers share the base's product."""
        return "weight_norm" if self.spec.dora else "change"

    # -- forward -------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        *,
        is_change: bool = False,
        gives_directions: bool = False,
        products: FrozenProducts | None = None,
    ) -> Tensor:
        """``x`` [..., in] -> [..., out] in the type of the base's output.

        Args:
            is_change: return ``s B A drop(x)`` alone, without the base's product.
            gives_directions: return ``A`` [r, in] alone, whose product with the base DoRA reads.
            products: return the change of DoRA alone, by these; ``x`` is after dropout.
        """
        if gives_directions:
            return self.lora_A.detach().clone()  # engines free it after the call
        if products is not None:
            return self._compute_dora_change(x, *products)
        if is_change:
            return self._compute_update(self.dropout(x))
        if not self.is_enabled:
            return self._forward_disabled(x)
        if self.is_plain and can_fuse_low_rank(x, self.spec.r, self.spec.arithmetic):
            # called by the base, whose hooks may gather its rows
            fused: Tensor = self.base(x, multiply=self._multiply_fused)
            return fused
        dropped = self.dropout(x)
        if self.spec.dora:
            return self._forward_dora(x, dropped)
        # The change comes first: recomputation under activation checkpointing stops at the last
        # tensor that backward needs, and the frozen product keeps none.
        change = self._compute_update(dropped)
        if self.spec.init == "lora_ga":
            change = change - self._multiply_factors(x, self.start_A, self.start_B)
        y: Tensor = self.base(x)
        return (y + change).to(y.dtype)

    @property
    def is_plain(self) -> bool:
        """Whether the change is ``s B A drop(x)`` alone."""
        spec = self.spec
        return not (spec.dora or spec.keep_zeros or spec.init == "lora_ga")

    def _multiply_fused(self, x: Tensor) -> Tensor:
        """Product and change, without the base's bias."""
        keys = self.dropout.make_keys(x)
        if self.siblings is not None and keys is None:
            shared = self.siblings.multiply(self, x)
            if shared is not None:
                return shared
        (y,) = apply_frozen_low_rank(x, [self.describe_product()], self.spec.scaling, keys)
        return y

    def describe_product(self) -> FrozenLowRank:
        """Return the tensors of the fused product, as they are now."""
        return FrozenLowRank(self.base.packed, self.base.codec, self.lora_A, self.lora_B)

    def _forward_disabled(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.spec.init not in RESIDUAL_INITS:
            return y
        # the stored base is the residual of these factors
        return (y + self._multiply_factors(x, self.start_A, self.start_B)).to(y.dtype)

    def _compute_update(self, x: Tensor) -> Tensor:
        if not self.spec.keep_zeros:
            return self._multiply_factors(x, self.lora_A, self.lora_B)
        base, spec = self.base, self.spec
        return apply_masked_low_rank(
            x, self.lora_A, self.lora_B, base.packed, base.codec, spec.scaling, spec.arithmetic
        )

    def _forward_dora(self, x: Tensor, dropped: Tensor) -> Tensor:
        base = self.base
        product = frozen_matmul(dropped, base.packed, base.codec, base.in_features)
        y = product
        if dropped is not x:
            y = frozen_matmul(x, base.packed, base.codec, base.in_features)
        directions = self.lora_A.detach().to(self.spec.arithmetic)
        image = frozen_matmul(directions, base.packed, base.codec, base.in_features)
        change = self._compute_dora_change(dropped, product, image)
        if base.bias is not None:
            y = y + base.bias.to(y.dtype)
        return (y + change).to(y.dtype)

    def _compute_dora_change(self, dropped: Tensor, product: Tensor, image: Tensor) -> Tensor:
        """``(m/n - 1) W drop(x) + m/n s B A drop(x)``.

        Args:
            product: ``W drop(x)`` [..., out].
            image: ``(W A^T)^T`` [r, out], in the arithmetic type.
        """
        factor = self.magnitude / self._compute_weight_norm(image)
        dtype = self.spec.arithmetic
        return (factor - 1).to(dtype) * product + factor.to(dtype) * self._compute_update(dropped)

    @torch.no_grad()
    def _compute_weight_norm(self, image: Tensor) -> Tensor:
        """``|| W_o + s (B A)_o ||`` [out], float32, from ``image`` [r, out]."""
        s, A, B = self.spec.scaling, self.lora_A, self.lora_B
        cross = (B * image.T).sum(1)
        square = ((B @ (A @ A.T)) * B).sum(1)
        return _exact_row_norm(self.base_norm2 + 2 * s * cross + s * s * square)

    # -- initialization ------------------------------------------------------------------------

    def load_initial_values(self, tensors: Mapping[str, Tensor]) -> None:
        """Start factors of an earlier run (whole, by own name), which ``prepare_base_rows`` or,
        with LoRA-GA, ``init_rows`` then uses."""
        given = {name: tensors[name] for name in self.start_names}
        if self.spec.init in RESIDUAL_INITS:
            self._given = given
        else:
            self._starts |= {name: (Span(0, len(value)), value) for name, value in given.items()}

    @property
    def needs_base_rows(self) -> bool:
        """Whether the start depends on the weight: PiSSA, LoftQ and DoRA; or zeros are counted."""
        return self.spec.init in RESIDUAL_INITS or self.spec.dora or self.spec.keep_zeros

    @torch.no_grad()
    def prepare_base_rows(self, rows: Tensor, span: Span, reduce: Reduce) -> Tensor:
        """Compute the initial factors and return the rows to quantize."""
        if self.spec.keep_zeros:
            self.num_zeros = int(reduce((rows == 0).sum()))
        initial = self._compute_initial_factors(rows, span, reduce)
        encoded = rows
        if initial is not None:
            for prefix, factors in (
                ("lora", initial.factors),
                ("start", initial.factors),
                ("removed", initial.removed),
            ):
                if factors is not None and f"{prefix}_A" in self.shapes:
                    self._starts[f"{prefix}_A"] = (Span(0, self.spec.r), factors.A.cpu())
                    self._starts[f"{prefix}_B"] = (span, factors.B.cpu())
            if initial.removed is not None:
                removed = initial.removed
                encoded = add_factor_product(rows, removed.B, removed.A, -self.spec.scaling)
        if self.spec.dora:
            self._compute_initial_norms(encoded, span, None if initial is None else initial.factors)
        return encoded

    def _compute_initial_factors(
        self, rows: Tensor, span: Span, reduce: Reduce
    ) -> InitialFactors | None:
        spec = self.spec
        if self._given:
            given, self._given = self._given, {}
            pairs = {
                name.removesuffix("_A"): LowRankFactors(
                    given[name], given[f"{name[:-1]}B"][span.slice]
                )
                for name in given
                if name.endswith("_A")
            }
            removed = "start" if spec.init == "pissa" else "removed"
            return InitialFactors(pairs["start"], pairs.get(removed))
        seed = derive_seed(spec.seed, self.path, spec.init)
        if spec.init == "pissa":
            return init_pissa_factors(
                rows, spec.r, spec.scaling, iterations=spec.iterations, seed=seed, reduce=reduce
            )
        if spec.init == "loftq":
            return init_loftq_factors(
                rows,
                spec.r,
                spec.scaling,
                self.base.codec,
                iterations=spec.iterations,
                seed=seed,
                reduce=reduce,
            )
        return None

    def _compute_initial_norms(
        self, rows: Tensor, span: Span, initial: LowRankFactors | None
    ) -> None:
        """Compute ``||W_o||^2`` of the dequantized base, and the first magnitude."""
        base_norm2 = torch.empty(rows.shape[0])
        norm2 = torch.empty(rows.shape[0])
        for part in Span(0, rows.shape[0]).split_into_chunks(_NORM_ROWS):
            weight = self.base.fake_quantize(rows[part.slice])
            base_norm2[part.slice] = weight.double().square().sum(1).float().cpu()
            if initial is not None:
                weight = add_factor_product(
                    weight, initial.B[part.slice], initial.A, self.spec.scaling
                )
            norm2[part.slice] = weight.double().square().sum(1).float().cpu()
        self._starts["base_norm2"] = (span, base_norm2)
        self._starts["magnitude"] = (span, _exact_row_norm(norm2))

    def _draw_initial_values(self, name: str) -> Tensor:
        """``A`` as PEFT starts it: Kaiming uniform with a = sqrt(5), in [-1, 1] / sqrt(in).

        Where training data give the start, it is zero until these have been read.
        """
        if self.spec.init in ("eva", "lora_ga") and name.endswith(("_A", "_B")):
            return torch.zeros(self.shapes[name])
        if name != "lora_A" or self.spec.init != "default":
            raise RuntimeError(f"{self.path}.{name} has no initial values before prepare_base_rows")
        value = torch.empty(self.shapes[name])
        return nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=self._make_generator(name))


def _exact_row_norm(squares: Tensor) -> Tensor:
    """Norms from their squares; a zero row gets a norm that can be divided by."""
    return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()
