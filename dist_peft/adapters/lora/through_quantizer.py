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

A base that comes quantized (GPTQ, AWQ, compressed-tensors) has no other rows than packed ones.
These are ``W`` then, codes move on their own grid, whose scales and zeros stay
(``quant.kept_grid``), and the first steps are plain LoRA's, whose updates are not rounded away.

With ``adapter.through_zeros`` a second pair, QA-LoRA's (``adapters.qalora.layer``), moves the zeros
of an integer base, which are fractions then::

    zero = quantize(W + s B A).zero - s (Bz Az) / scale      Az [r, in / group], Bz [out, r]

The gradient goes straight through the rounding (Bengio et al. 2013). What differs from quantization
aware training with LoRA (axolotl's for NVFP4, LoTA-QAF): no rank has a dense merged weight, a dense
gradient or another rank's rows.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from dist_peft.adapters.lora.layer import FrozenProducts, LoraLinear
from dist_peft.adapters.low_rank.blocked_product import BLOCK_ROWS, add_blocked_product
from dist_peft.adapters.low_rank.zero_points import move_packed_zeros
from dist_peft.adapters.step_hooks import ParameterAccess
from dist_peft.core.config.adapter_checks import NESTED_SCALES
from dist_peft.core.config.through_options import ThroughStart
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.adapter_module import JoinedForm, Reduce, RowUpdate
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.quant.codec import make_finer_codec
from dist_peft.quant.kept_grid import count_changed_codes, quantize_on_grid
from dist_peft.quant.packed_rows import count_chunk_rows
from dist_peft.quant.through_product import ZeroFactors, multiply_through

__all__ = [
    "FEW_MOVED",
    "NF4_BLOCK",
    "ThroughLinear",
    "encode_by_blocks",
    "keep_rows_exactly",
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


class ThroughLinear(LoraLinear):
    """A ``FrozenLinear`` whose packed rows are those of ``W + s B A``.

    The adapter cannot be switched off: the base's own bytes are no longer there.

    Attributes:
        start: form of the first steps (``adapter.through_start``), while it is trained in it.
        own_span: this rank's rows of the weight.
        own_rows: these rows of the base's files, ``[len(own_span), in]`` in host memory, in the
            narrowest type that holds them exactly; of a base that is packed in its files, the
            packed rows.
        num_changed: of such a base, weights of own rows whose code was another one than the base's
            when ``encode_own_rows`` last counted them.
        zero_A, zero_B: ``[r, groups]``, ``[out, r]``, with ``train_zeros`` only.
    """

    keeps_base = False
    start: ThroughStart = "none"
    own_span: Span
    own_rows: Tensor
    num_changed = 0
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

    @property
    def joined_form(self) -> JoinedForm:
        return None  # it trains the base's bytes

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

    def set_start(self, start: ThroughStart) -> None:
        """Take another form than the base's, on meta, before the model is sharded."""
        self.start = start
        if start == "8bit":
            base = self.base
            assert base.packed.is_meta
            base.codec = make_finer_codec(base.codec)
            size = base.codec.num_row_bytes(base.in_features)
            empty = torch.empty(base.out_features, size, dtype=torch.uint8, device="meta")
            base.packed = nn.Parameter(empty, requires_grad=False)

    @property
    def needs_base_rows(self) -> bool:
        """True: rows are kept."""
        return True

    @torch.no_grad()
    def prepare_base_rows(self, rows: Tensor, span: Span, reduce: Reduce) -> Tensor:
        """Keep the rows and return them: with ``B`` zero they are what is quantized."""
        if self.base.stored is None:
            self.own_span, self.own_rows = span, keep_rows_exactly(rows)
        return rows

    @torch.no_grad()
    def keep_packed_rows(self, packed: Tensor, span: Span) -> None:
        """Keep rows of a base that is packed in its files: they are ``W`` and its grid."""
        host = packed.detach().to("cpu", copy=True)
        self.own_span, self.own_rows = span, host.pin_memory() if packed.is_cuda else host

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
        self.num_changed = 0
        base, grid = self.base, self.base.codec.affine_rows

        def encode_chunk(span: Span) -> Tensor:
            own = self.own_rows[span.shifted_by(-self.own_span.start).slice]
            kept = own.to(device, non_blocking=True)
            if base.stored is None:
                merged = add_blocked_product(kept, left, right, span)
                packed = base.codec.quantize_to_packed(merged)
                if moved is None or grid is None:
                    return packed
                return move_packed_zeros(packed, *moved, span, grid, base.in_features)
            assert grid is not None
            rows = base.codec.dequantize_rows(kept, base.in_features, torch.float32)
            merged = add_blocked_product(rows, left, right, span)
            packed = quantize_on_grid(merged, kept, grid, base.in_features)
            if count:
                self.num_changed += count_changed_codes(packed, kept, grid, base.in_features)
            return packed

        try:
            return encode_by_blocks(base, self.own_span, encode_chunk, device)
        except ValueError as error:
            raise UserError(
                f"{self.path}: rows of W + s B A cannot be quantized: {error}; lower train.lr"
            ) from None

    def _widen_factors(self, A: Tensor, B: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """``[out, r]``, of which rows of other ranks are zero since a row of a product depends on
        no other one, and ``s A`` on ``device``."""
        left = B.new_zeros(self.base.out_features, B.shape[1])
        left[self.own_span.slice] = B
        return left, A.to(device, torch.float32) * self.spec.scaling


def encode_by_blocks(
    base: FrozenLinear, span: Span, encode: Callable[[Span], Tensor], device: torch.device
) -> Tensor:
    """Encode rows ``span`` a chunk at a time, so that one chunk is in memory in float32.

    Args:
        encode: a span -> its packed rows.

    Raises:
        ValueError: values that the codec cannot represent.
    """
    size = base.codec.num_row_bytes(base.in_features)
    packed = torch.empty(len(span), size, dtype=torch.uint8, device=device)
    chunk = max(1, count_chunk_rows(base.in_features, device) // BLOCK_ROWS) * BLOCK_ROWS
    for part in _split_at_blocks(span, chunk):
        own = part.shifted_by(-span.start).slice
        packed[own] = encode(part)
    return packed


def _split_at_blocks(span: Span, chunk: int) -> Iterator[Span]:
    """Split at multiples of ``chunk`` counted from row 0, so that no block is computed twice."""
    start = span.start
    while start < span.stop:
        stop = min(span.stop, (start // chunk + 1) * chunk)
        yield Span(start, stop)
        start = stop


def keep_rows_exactly(rows: Tensor) -> Tensor:
    """Copy float32 rows to host memory, pinned for a GPU, in 16 bits where these hold them exactly.

    The rows of a base in bfloat16 or float16 are kept in their own type, without knowing it.
    """
    host = rows.detach().to("cpu", copy=True)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = host.to(dtype)
        if torch.equal(narrow.float(), host):
            host = narrow
            break
    return host.pin_memory() if rows.is_cuda else host


def resolve_start(start: ThroughStart, layers: Sequence[ThroughLinear]) -> ThroughStart:
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


def require_codec(name: str, module: FrozenLinear) -> None:
    """Refuse a linear that cannot be trained through its codec.

    Raises:
        UserError: it is not quantized, is packed in its files in a format without integer codes, or
            NF4 blocks of bitsandbytes would cross its rows.
    """
    if module.stored is not None and module.codec.affine_rows is None:
        raise UserError(
            "adapter.through_quantizer moves the codes of a packed base on its own scales and "
            f"zeros, but {name} comes from base.path as {module.codec.name}, whose codes are no "
            "integers: give the unquantized base with base.quant, a base in GPTQ, AWQ or "
            "compressed-tensors integers, or set adapter.through_quantizer: false"
        )
    if not module.codec.is_quantized:
        raise UserError(
            f"adapter.through_quantizer trains the quantized weights, but {name} is not quantized; "
            "set base.quant, or take the module out of adapter.target_modules"
        )
    nf4 = module.codec.nf4_rows
    if nf4 is not None and nf4.double_quant:
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
    """Encode this rank's rows of every ``ThroughLinear`` again. Collective.

    Args:
        count: of a packed base, warn where hardly any code of this rank's rows has moved.
    """
    encoded: list[ThroughLinear] = []

    def encode_all() -> Iterator[RowUpdate]:
        for path, layer in layers:
            if isinstance(layer, ThroughLinear) and layer.start != "lora":
                A = access.gather_parameter(f"{path}.lora_A")
                B = access.gather_matching_rows(f"{path}.lora_B", layer.base.packed)
                zeros = None
                if layer.trains_zeros:
                    Bz = access.gather_matching_rows(f"{path}.zero_B", layer.base.packed)
                    zeros = (access.gather_parameter(f"{path}.zero_A"), Bz)
                rows = layer.encode_own_rows(A, B, access.device, zeros=zeros, count=count)
                encoded.append(layer)
                yield RowUpdate(layer.base, "packed", rows)

    access.overwrite_local_rows(encode_all())
    if count:
        _warn_of_few_moved([layer for layer in encoded if layer.base.stored is not None])


def _warn_of_few_moved(layers: Sequence[ThroughLinear]) -> None:
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
