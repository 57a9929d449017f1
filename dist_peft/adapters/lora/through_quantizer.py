"""LoRA through the quantizer: the trained model is the merged model in the base's own format.

::

    Q = quantize(W + s B A)     forward: y = x Q^T + b      (``quant.through_product``)

``W`` are the rows of the base's files, not the decoded base: a decoded weight lies in the middle
of its cell and must move half a step before any code changes. After each update every rank

1. gathers ``A`` [r, in], which is small; of ``B`` [out, r] it needs its own rows, which it has
   where an engine shards ``B`` as the weight, or keeps it whole,
2. adds ``s B A`` to its own rows of ``W``, which it keeps in host memory (1/N of them), in blocks
   of 64 rows counted from row 0 of the whole matrix (``low_rank.blocked_product``),
3. quantizes these rows with the base's codec and writes the bytes over those in its shard.

Codecs are row-local and the blocks do not depend on the shards, so that the bytes are the same on
any number of ranks and on every engine. What travels in a step is packed rows, as many as before.
``Q`` is a function of ``W``, ``A`` and ``B``: checkpoints hold the factors, and a resume encodes
the rows again.

A base that comes quantized has no other rows than packed ones. These are ``W`` then, codes move on
their own grid, whose scales and zeros stay (``quant.kept_grid``), and the first steps are plain
LoRA's, whose updates are not rounded away.

``through_experts`` has the same for the experts of a mixture.

With ``adapter.through_zeros`` a second pair, QA-LoRA's (``adapters.qalora.layer``), moves the zeros
of an integer base, which are fractions then::

    zero = quantize(W + s B A).zero - s (Bz Az) / scale      Az [r, in / group], Bz [out, r]

The gradient goes straight through the rounding (Bengio et al. 2013). What differs from quantization
aware training with LoRA (axolotl's for NVFP4, LoTA-QAF): no rank has a dense merged weight, a dense
gradient or another rank's rows.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from dist_peft.adapters.lora.layer import FrozenProducts, LoraLinear
from dist_peft.adapters.lora.through_rows import ThroughRows
from dist_peft.adapters.low_rank.blocked_product import add_blocked_product
from dist_peft.adapters.low_rank.zero_points import move_packed_zeros
from dist_peft.adapters.step_hooks import ParameterAccess
from dist_peft.core.config.adapter_checks import NESTED_SCALES
from dist_peft.core.config.through_options import ThroughStart
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.adapter_module import RowUpdate
from dist_peft.model.frozen_linear import FrozenLinear, FrozenWeight
from dist_peft.quant.through_product import ZeroFactors, multiply_through

__all__ = [
    "FEW_MOVED",
    "NF4_BLOCK",
    "ThroughLinear",
    "require_codec",
    "require_trainable_zeros",
    "resolve_start",
    "update_rows",
]

log = logging.getLogger("dist_peft")

FEW_MOVED = 0.02
"""Share of moved codes of a packed base below which a run is warned."""

NF4_BLOCK = 64
"""Block of bitsandbytes: its blocks run over the flattened weight, and so agree with rows whose
length it divides."""


class ThroughLinear(ThroughRows, LoraLinear):
    """A ``FrozenLinear`` whose packed rows are those of ``W + s B A``; see ``ThroughRows``.

    Attributes:
        zero_A, zero_B: ``[r, groups]``, ``[out, r]``, with ``train_zeros`` only.
    """

    base: FrozenLinear
    zero_A: nn.Parameter
    zero_B: nn.Parameter

    def train_zeros(self, device: torch.device | str = "meta") -> None:
        """Add the pair that moves the zeros of groups."""
        grid = self.base.codec.affine_rows
        assert grid is not None
        groups = -(-self.base.in_features // grid.group_size)
        self._add_meta_parameter("zero_A", (self.spec.r, groups), device, train=True)
        shape_b = (self.base.out_features, self.spec.r)
        self._add_meta_parameter("zero_B", shape_b, device, train=True)

    @property
    def trains_zeros(self) -> bool:
        """Whether a pair moves the zeros."""
        return "zero_A" in self.shapes

    def _draw_initial_values(self, name: str) -> Tensor:
        """``A`` as LoRA's, the pair of the zeros as QA-LoRA's."""
        if name == "zero_B":
            return torch.zeros(self.shapes[name])
        if name != "zero_A":
            return super()._draw_initial_values(name)
        bound = self.base.in_features**-0.5
        value = torch.empty(self.shapes[name])
        return value.uniform_(-bound, bound, generator=self._make_generator(name))

    def forward(
        self,
        x: Tensor,
        *,
        is_change: bool = False,
        gives_directions: bool = False,
        products: FrozenProducts | None = None,
    ) -> Tensor:
        """``x`` [..., in] -> [..., out] in the type of ``x``; there is no change alone."""
        assert not is_change, "the base's bytes are trained"
        if self.start == "lora":
            return super().forward(x)
        base, spec, zeros = self.base, self.spec, None
        if self.trains_zeros:
            assert base.codec.affine_rows is not None
            zeros = ZeroFactors(self.zero_A, self.zero_B, base.codec.affine_rows.group_size)
        y = multiply_through(
            x,
            base.packed,
            self.lora_A,
            self.lora_B,
            codec=base.codec,
            scaling=spec.scaling,
            dtype=spec.arithmetic,
            zeros=zeros,
        )
        return y if base.bias is None else y + base.bias.to(y.dtype)

    def encode_from_factors(self, name: str, access: ParameterAccess, *, count: bool) -> Tensor:
        """Gather ``A`` and own rows of ``B``; see ``ThroughRows``."""
        A = access.gather_parameter(f"{name}.lora_A")
        B = access.gather_matching_rows(f"{name}.lora_B", self.base.packed)
        zeros = None
        if self.trains_zeros:
            Bz = access.gather_matching_rows(f"{name}.zero_B", self.base.packed)
            zeros = (access.gather_parameter(f"{name}.zero_A"), Bz)
        return self.encode_own_rows(A, B, access.device, zeros=zeros, count=count)

    @torch.no_grad()
    def encode_own_rows(
        self,
        A: Tensor,
        B: Tensor,
        device: torch.device,
        *,
        zeros: tuple[Tensor, Tensor] | None = None,
        count: bool = False,
    ) -> Tensor:
        """Return this rank's rows of ``quantize(W + s B A)``, ``uint8 [rows, row_bytes]``.

        Args:
            A: whole, ``[r, in]``, float32.
            B: own rows, ``[len(own_span), r]``, float32.
            device: where rows are encoded.
            zeros: ``zero_A``, whole, and own rows of ``zero_B``.
            count: of a packed base, count the codes that changed.

        Raises:
            UserError: the codec cannot hold the values.
        """
        left, right = self._widen_factors(A, B, device)
        moved = None if zeros is None else self._widen_factors(*zeros, device)
        base, grid = self.base, self.base.codec.affine_rows

        def move_zeros(packed: Tensor, span: Span) -> Tensor:
            assert moved is not None and grid is not None
            return move_packed_zeros(packed, *moved, span, grid, base.in_features)

        return self.encode_added_rows(
            lambda rows, span: add_blocked_product(rows, left, right, span),
            device,
            finish=None if moved is None else move_zeros,
            count=count,
        )

    def _widen_factors(self, A: Tensor, B: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """``[out, r]``, of which rows of other ranks are zero since a row of a product depends on
        no other one, and ``s A`` on ``device``."""
        left = B.new_zeros(self.base.out_features, B.shape[1])
        left[self.own_span.slice] = B
        return left, A.to(device, torch.float32) * self.spec.scaling


def resolve_start(start: ThroughStart, layers: Sequence[ThroughRows]) -> ThroughStart:
    """Return the form of the first steps.

    Raises:
        UserError: 8 bits of a base that is packed in its files.
    """
    packed = [layer.path for layer in layers if layer.base.stored is not None]
    if start == "auto":
        return "lora" if packed else "none"
    if start == "8bit" and packed:
        raise UserError(
            f"adapter.through_start: 8bit encodes the base's own 16-bit rows, but {packed[0]} "
            "comes quantized from base.path; use lora or none"
        )
    return start


def require_codec(name: str, module: FrozenWeight) -> None:
    """Refuse a linear, or experts, that cannot be trained through their codec.

    Raises:
        UserError: it is not quantized, or blocks of bitsandbytes would cross its rows.
    """
    if not module.codec.is_quantized:
        raise UserError(
            f"adapter.through_quantizer trains the quantized weights, but {name} is not quantized; "
            "set base.quant, or take the module out of adapter.target_modules"
        )
    nf4 = module.codec.nf4_rows
    if nf4 is not None and nf4.double_quant and module.stored is None:
        raise UserError(NESTED_SCALES)
    if nf4 is not None and module.in_features % NF4_BLOCK:
        raise UserError(
            f"adapter.through_quantizer: {name} has in_features {module.in_features}, which "
            f"{NF4_BLOCK} does not divide: blocks of bitsandbytes would run from one row into the "
            "next, and no NF4 model could hold the trained codes; take the module out of "
            "adapter.target_modules, or use base.quant.kind: int"
        )


def require_trainable_zeros(name: str, module: FrozenLinear) -> None:
    """Refuse a linear without zeros that a pair could move.

    Raises:
        UserError: it is not of integers, or its files keep its zeros.
    """
    if module.stored is not None:
        raise UserError(
            f"adapter.through_zeros: the zeros of {name} are those of the files of base.path; give "
            "the unquantized base with base.quant, or leave through_zeros out"
        )
    if module.codec.affine_rows is None:
        raise UserError(
            f"adapter.through_zeros trains zeros of an integer base, but {name} is stored as "
            f"{module.codec.name}, which has none; set base.quant.kind: int, or leave it out"
        )


def update_rows(
    layers: Iterable[tuple[str, nn.Module]], access: ParameterAccess, *, count: bool = False
) -> None:
    """Encode this rank's rows of every layer again that is trained so. Collective.

    Args:
        count: of a packed base, warn where hardly any code of this rank's rows has moved.
    """
    encoded: list[ThroughRows] = []

    def encode_all() -> Iterator[RowUpdate]:
        for path, layer in layers:
            if isinstance(layer, ThroughRows) and layer.start != "lora":
                rows = layer.encode_from_factors(path, access, count=count)
                encoded.append(layer)
                yield RowUpdate(layer.base, "packed", rows)

    access.overwrite_local_rows(encode_all())
    if count:
        _warn_of_few_moved([layer for layer in encoded if layer.base.stored is not None])


def _warn_of_few_moved(layers: Sequence[ThroughRows]) -> None:
    """Warn where updates are too small for the grid of a packed base."""
    weights = sum(len(layer.own_span) * layer.base.in_features for layer in layers)
    if not weights:
        return
    share = sum(layer.num_changed for layer in layers) / weights
    if share < FEW_MOVED:
        log.warning(
            "adapter.through_quantizer: %.2f %% of the codes of the packed base have moved. Its "
            "weights lie in the middle of their cells, and nothing is trained before an update is "
            "half a step of the grid: raise train.lr, train.steps or adapter.through_start_share, "
            "or give the unquantized base",
            100 * share,
        )
