"""Folding an adapter into weight rows, without a model.

Row-local, so that an export can walk a base of any size in chunks. With ``W`` the rows given:

    LoRA        W' = W + s B A
    DoRA        W'_o = m_o V_o / ||V_o||        V = W + s B A
    embedding   W' = W + s (B A)^T              rows are vocabulary ids
    experts     LoRA, each expert's rows with its own A
    QA-LoRA     LoRA whose A repeats within a group; or exactly into the zeros
    (``adapters.low_rank.zero_points``)
    through     the rows that are quantized are W + s B A; decoded they are merged already.
                ``zero_A``, ``zero_B`` move their zeros too

PiSSA and LoftQ adapters are stored as the change since initialization (``adapters.directory``), as
needed by the *original* base. The base *decoded* as training saw it,
``decode(encode(compute_encoded_rows))``, needs the trained factors alone.
"""

import threading
from collections.abc import Mapping
from typing import Literal, Self

import torch
from torch import Tensor

from dist_peft.adapters.lora.tensors import LoraTensors, parse_lora_tensors
from dist_peft.adapters.low_rank.blocked_product import add_blocked_product, add_expert_products
from dist_peft.adapters.low_rank.float_rows_merger import find_weight_shape
from dist_peft.adapters.low_rank.row_sharded import add_factor_product
from dist_peft.adapters.low_rank.zero_points import (
    merge_into_zeros,
    move_packed_zeros,
    unmerge_from_zeros,
)
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.quant.codec_defaults import AffineParts, AffineRows

__all__ = ["THROUGH_KEY", "LoraMerger", "sum_group_change"]

THROUGH_KEY = "through_quantizer"
"""Key of ``adapter_config.json`` that is true where adapter and base apart are not the model."""


class LoraMerger:
    """One adapter, by weight name such as ``model.layers.0.self_attn.q_proj.weight``.

    Args:
        modules: module path -> factors.
        init: pissa or loftq where the factors hold the change since that initialization.
        extra: LoftQ's extra product, ``PATH.removed_A`` and ``PATH.removed_B``, or the pair that
            moves zeros, ``PATH.zero_A`` and ``PATH.zero_B``.
        is_through: trained through the quantizer (``adapters.lora.through_quantizer``).
    """

    def __init__(
        self,
        modules: dict[str, LoraTensors],
        init: str | None,
        extra: dict[str, Tensor],
        is_through: bool = False,
    ) -> None:
        self._is_through = is_through
        self._modules = {f"{path}.weight": module for path, module in modules.items()}
        self._init = init
        self._extra: dict[str, dict[str, Tensor]] = {}
        for name, value in extra.items():
            path, _, own = name.rpartition(".")
            self._extra.setdefault(f"{path}.weight", {})[own] = value
        self._rows_left = {name: module.shape[0] for name, module in self._modules.items()}
        self._scaled = _ScaledFactors()

    @classmethod
    def from_public_adapter(cls, public: PublicAdapter, *, tied: bool = False) -> Self:
        """Return the merger of a LoRA or QA-LoRA adapter.

        Args:
            public: ours or PEFT's own.
            tied: the base's output head shares the input embedding's weight.

        Raises:
            UserError: see ``parse_lora_tensors``; or the embedding is adapted and tied.
        """
        modules = parse_lora_tensors(public)
        embedding = next((path for path, f in modules.items() if f.is_embedding), None)
        if tied and embedding is not None:
            raise UserError(
                f"the adapter adapts the embedding {embedding}, whose weight the base's output "
                "head shares unadapted: one merged weight cannot be both. Keep this adapter "
                "unmerged, merge into a base saved with tie_word_embeddings: false and a head of "
                "its own, or train with adapter.embeddings: false"
            )
        is_through = bool(public.config.get(THROUGH_KEY))
        return cls(modules, public.facts.get("start"), public.extra, is_through)

    def changes_weight(self, weight: str) -> bool:
        """Whether the adapter changes this weight."""
        return weight in self._modules

    def check_weight_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Check, before a row is merged, that the adapter fits a base.

        Args:
            shapes: weight name -> rows and columns in the base.

        Raises:
            UserError: the base has no such weight, or of another shape.
        """
        for weight, module in self._modules.items():
            rows, columns = find_weight_shape(weight, shapes)
            self._check_weight_shape(weight, columns, Span(0, rows))
            if rows != module.shape[0]:
                raise UserError(
                    f"{weight}: the adapter is for a weight of shape {list(module.shape)}, but the "
                    f"base's is {[rows, columns]}; it belongs to another base"
                )

    def merge_weight_rows(
        self, weight: str, rows: Tensor, span: Span, in_base: Literal["original", "decoded"]
    ) -> Tensor:
        """Merge rows ``span`` of an adapted weight.

        Args:
            weight: a name that ``changes_weight``.
            rows: floating point [len(span), columns].
            span: which rows these are.
            in_base: original: rows of the base's files. decoded: rows as training saw them.

        Returns:
            float32, the shape of ``rows``.

        Raises:
            UserError: the shapes show that the adapter belongs to another base.
        """
        module = self._modules[weight]
        self._check_weight_rows(weight, rows, span)
        if self._is_through:
            if in_base == "original":
                raise UserError(_explain_through(weight))
            return rows.float()
        merged = rows
        if in_base == "decoded" and self.has_initial_factors(weight):
            r = module.A.shape[0] // 2
            A = module.A[:r].to(rows.device) * module.scaling
            merged = add_blocked_product(rows, module.B[:, :r], A, span)
        else:
            merged = self._scaled.add_module_delta(rows, module, span)
        if module.magnitude is not None:
            norm = merged.double().square().sum(1).sqrt().float()
            norm = norm.clamp_min(torch.finfo(torch.float32).tiny ** 0.5)
            magnitude = module.magnitude[span.slice].to(rows.device)
            merged = (magnitude / norm)[:, None] * merged
        self._rows_left[weight] -= len(span)
        return merged

    def depends_on_base(self, weight: str) -> bool:
        """Whether the change depends on the base's rows: DoRA."""
        return self._modules[weight].magnitude is not None

    def compute_delta_rows(self, weight: str, span: Span) -> Tensor:
        """Return the change that a merge into the original base adds to rows ``span``, float32.

        Raises:
            UserError: with DoRA, where the change depends on the base.
        """
        module = self._modules[weight]
        if self._is_through:
            raise UserError(_explain_through(weight))
        if self.depends_on_base(weight):
            raise UserError(
                f"{weight} is adapted by DoRA, whose change depends on the base's rows, which a "
                "merge scales: it cannot be taken out again; merge the other run into the base"
            )
        zeros = torch.zeros(len(span), module.shape[1])
        return self._scaled.add_module_delta(zeros, module, span)

    def compute_group_change(self, weight: str, parts: AffineParts, span: Span) -> Tensor:
        """Return the adapter's change to all weights of a group, float32 ``[len(span), groups]``.

        Raises:
            UserError: weights of a group change differently, or the adapter is another base's.
        """
        module = self._modules[weight]
        groups = parts.scale.shape[1]
        group_size = parts.codes.shape[1] // groups
        columns = module.shape[1]
        if -(-columns // group_size) != groups:
            columns = groups * group_size
        self._check_weight_shape(weight, columns, span)
        change = sum_group_change(module, group_size, span)
        if change is None:
            raise UserError(
                f"{weight}: the adapter changes the weights of a group of {group_size} "
                "differently, which the group's one zero cannot hold; only QA-LoRA (adapter.kind "
                f"qalora) with a pool_size that is a multiple of {group_size} merges into zeros"
            )
        return change

    def merge_affine_parts(self, weight: str, parts: AffineParts, span: Span) -> AffineParts:
        """Merge rows ``span`` of an integer base exactly: other zeros, the same codes and scales.

        Args:
            weight: a name that ``changes_weight``.
            parts: the rows as training saw them.
            span: which rows these are.

        Returns:
            ``zero`` float32 ``[len(span), groups]``.

        Raises:
            UserError: see ``compute_group_change``.
        """
        merged = merge_into_zeros(parts, self.compute_group_change(weight, parts, span))
        self._rows_left[weight] -= len(span)
        return merged

    def unmerge_affine_parts(
        self, weight: str, parts: AffineParts, span: Span, *, integer: bool = True
    ) -> AffineParts:
        """Take the adapter out again, bit for bit. See
        ``adapters.low_rank.zero_points.unmerge_from_zeros``."""
        return unmerge_from_zeros(
            parts, self.compute_group_change(weight, parts, span), integer=integer
        )

    def compute_encoded_rows(self, weight: str, rows: Tensor, span: Span) -> Tensor:
        """Return the rows that training quantized: PiSSA and LoftQ subtract a part first; through
        the quantizer they are those of ``W + s B A``, by the products that training took."""
        if self._is_through and weight in self._modules:
            self._check_weight_rows(weight, rows, span)
            self._rows_left[weight] -= len(span)
            return self._scaled.add_module_delta(rows, self._modules[weight], span)
        if not self.has_initial_factors(weight):
            return rows
        self._check_weight_rows(weight, rows, span)
        module = self._modules[weight]
        if self._init == "pissa":
            r = module.A.shape[0] // 2  # B[:, r:] is -B0
            return add_factor_product(rows, module.B[span.slice, r:], module.A[r:], module.scaling)
        if weight not in self._extra:
            return rows
        removed = self._extra[weight]
        return add_factor_product(
            rows, removed["removed_B"][span.slice], removed["removed_A"], -module.scaling
        )

    def finish_packed_rows(
        self, weight: str, packed: Tensor, span: Span, rows: AffineRows | None, columns: int
    ) -> Tensor:
        """Return packed rows with the trained zeros, where ``adapter.through_zeros`` trained any.

        Raises:
            UserError: the pair has other groups than the base, or a zero is beyond fp16.
        """
        pair = self._extra.get(weight, {})
        if not self._is_through or "zero_A" not in pair:
            return packed
        A, B = pair["zero_A"].to(packed.device, torch.float32), pair.get("zero_B")
        out, groups = self._modules[weight].shape[0], A.shape[-1]
        if rows is None or B is None or -(-columns // rows.group_size) != groups or len(B) != out:
            raise UserError(
                f"{weight}: the adapter moves the zeros of {groups} groups of {out} rows, which "
                "the base does not have; it belongs to another base or base.quant"
            )
        try:
            scaled = A * self._modules[weight].scaling
            return move_packed_zeros(packed, B, scaled, span, rows, columns)
        except ValueError as error:
            raise UserError(f"{weight}: {error}") from None

    def has_initial_factors(self, weight: str) -> bool:
        """Whether the weight was trained on a base with its start (PiSSA, LoftQ) taken away."""
        module = self._modules.get(weight)
        return self._init is not None and module is not None and not module.is_embedding

    @property
    def starts_from_base(self) -> bool:
        """Whether factors hold the change since an initialization from the base's weights."""
        return self._init is not None

    def compute_initial_rows(self, weight: str, rows: Tensor, span: Span) -> Tensor:
        """What the first step of training computed with, where ``has_initial_factors``: ``rows``,
        decoded as training saw them, with the start added; float32."""
        self._check_weight_rows(weight, rows, span)
        module = self._modules[weight]
        r = module.A.shape[0] // 2
        # B[:, r:] is -B0; DoRA's magnitude starts as the norm of this, so that it changes nothing
        return add_factor_product(rows, module.B[span.slice, r:], module.A[r:], -module.scaling)

    def list_unused_tensors(self) -> list[str]:
        """Adapted weights of which not every row was merged."""
        return [name for name, rows in self._rows_left.items() if rows > 0]

    def _check_weight_rows(self, weight: str, rows: Tensor, span: Span) -> None:
        """Refuse rows of another base."""
        self._check_weight_shape(weight, rows.shape[1], span)
        module = self._modules[weight]
        if module.saved_base is not None:
            saved = module.saved_base[span.slice].to(rows.device)
            if not torch.equal(rows.to(saved.dtype), saved):
                raise UserError(
                    f"{weight}: the adapter was trained on another embedding than the base has "
                    "(resized or trained); merge it with PEFT itself"
                )

    def _check_weight_shape(self, weight: str, columns: int, span: Span) -> None:
        module = self._modules[weight]
        if span.stop <= module.shape[0] and columns == module.shape[1]:
            return
        if module.pool > 1 and columns == module.A.shape[1]:
            raise UserError(
                f"{weight}: the adapter's A has a column for each input, so it is no QA-LoRA: PEFT "
                "ignores use_qalora except on GPTQ linears and trains plain LoRA; set use_qalora "
                "to false in its adapter_config.json"
            )
        raise UserError(
            f"{weight}: the adapter is for a weight of shape {list(module.shape)}, but the base "
            f"has rows up to {span.stop} of [{columns}] elements; it belongs to another base"
        )


def _explain_through(weight: str) -> str:
    return (
        f"{weight} was trained through the quantizer: only quantize(W + s B A) is the trained "
        "weight, and no change of the base's own rows is; use dist-peft merge or export on the run"
    )


def sum_group_change(module: LoraTensors, group_size: int, span: Span) -> Tensor | None:
    """``D`` for rows ``span``: float32 ``[len(span), groups]``, or None if the adapter does not add
    the same to all weights of a group."""
    if module.is_embedding or module.magnitude is not None or module.experts > 1:
        return None
    wide = module.expanded_lora_A()
    first = wide[:, ::group_size]
    whole = first.repeat_interleave(group_size, 1)[:, : wide.shape[1]]
    if not torch.equal(whole, wide):
        return None
    change = torch.zeros(len(span), first.shape[1])
    return add_factor_product(change, module.B[span.slice], first, module.scaling)


class _ScaledFactors(threading.local):
    """Keeps ``s A`` of the weight that each thread is at, for all its chunks."""

    def __init__(self) -> None:
        self._module: LoraTensors | None = None
        self._right = torch.empty(0)

    def add_module_delta(self, rows: Tensor, module: LoraTensors, span: Span) -> Tensor:
        """Return ``rows + s B A`` for rows ``span`` of a weight, float32."""
        if module.experts > 1:
            factors = (module.B, module.A, module.scaling, module.experts)
            return add_expert_products(rows, *factors, span)
        left = module.A.T if module.is_embedding else module.B
        if self._module is not module or self._right.device != rows.device:
            right = module.B.T if module.is_embedding else module.expanded_lora_A()
            self._module, self._right = module, right.to(rows.device) * module.scaling
        return add_blocked_product(rows, left, self._right, span)
